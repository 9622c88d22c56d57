"""A store of any Mixtral geometry with random weights, written in packed form: for measuring, without a checkpoint."""
