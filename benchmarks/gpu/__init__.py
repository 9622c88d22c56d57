"""What a GPU makes of this, for whoever has one: `make gpu`. One JSON report, without names of hosts or users."""
