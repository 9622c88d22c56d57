"""The daemon that owns a model's experts, and the converter that makes them. The serving modules import no torch."""
