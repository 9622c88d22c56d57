"""Where experts are computed. The model sees `source.ExpertSource` only."""
