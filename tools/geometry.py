"""The sizes of a Mixtral without weights: as flags, and as the Hub's config.json. Knows no files and no weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import click

MIXTRAL_8X7B = "mixtral-8x7b"

_Command = TypeVar("_Command", bound=Callable[..., None])


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of one Mixtral."""

    n_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int
    top_k: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    context: int = 32768
    is_tied: bool = False

    def config_document(self) -> dict[str, object]:
        """Return config.json as the Hub has it for a Mixtral of these sizes."""
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "hidden_act": "silu",
            "sliding_window": None,
            "tie_word_embeddings": self.is_tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "router_aux_loss_coef": 0.02,
            "output_router_logits": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "torch_dtype": "bfloat16",
        }


GEOMETRIES = {
    MIXTRAL_8X7B: Geometry(
        n_layers=32,
        hidden=4096,
        intermediate=14336,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocab=32000,
        experts=8,
        top_k=2,
    )
}

# What a flag may change; a small geometry makes a small file for tests.
_SIZES = ("hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab", "experts", "top_k")


def geometry_options(command: _Command) -> _Command:
    """Add --geometry, --layers and a flag for every size."""
    options = [
        click.option(
            "--geometry",
            "geometry_name",
            type=click.Choice(sorted(GEOMETRIES)),
            default=MIXTRAL_8X7B,
            show_default=True,
            help="The sizes that no flag changes.",
        ),
        click.option("--layers", "n_layers", type=click.IntRange(min=1), help="How many layers; all if not given."),
    ]
    options += [
        click.option(
            f"--{size.replace('_', '-')}", type=click.IntRange(min=1), help="Another size than the geometry's."
        )
        for size in _SIZES
    ]
    for option in reversed(options):
        command = option(command)
    return command


def chosen_geometry(geometry_name: str, sizes: dict[str, int | None]) -> Geometry:
    """Return the named geometry with the sizes that a flag gave."""
    given = {name: value for name, value in sizes.items() if value is not None}
    return replace(GEOMETRIES[geometry_name], **given)  # type: ignore[arg-type]  # no flag gives is_tied, a bool
