"""What on this machine limits expertd, and the remedy for each. Checks are pure: readings in, findings out."""
