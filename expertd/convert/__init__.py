"""From a checkpoint to a store. The only part of expertd that knows torch and quant; the daemon never imports it."""
