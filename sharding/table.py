"""The one table of what splits what; read without jax."""

from collections.abc import Mapping

from k2jax.config import MESH_AXES

# Outside the experts tokens are spread over all of these, so no device idles.
BATCH = ("replica", "data", "expert")

# STORAGE axes only split stored weights (FSDP); weights are gathered just before use. Experts are
# already split over `expert`, so their storage is split over `data` and `context` too. All other
# weights, 1% of K2, are split over one axis only: TPUs gather over a whole pod by an all-reduce,
# for twice the bytes.
LAYOUT: Mapping[str, tuple[str, ...]] = {
    "batch": BATCH,
    "cache": BATCH,
    "length": ("context",),
    "vocab": ("model",),
    "heads": ("model",),
    "heads_of_row": ("model", "context"),  # while attention has whole rows
    "ffw": ("model",),
    "shared_ffw": ("model",),
    "expert_ffw": ("model",),
    "experts": ("expert",),
    "embed": ("expert",),
    "expert_embed": ("data", "context"),
    "q_latent": ("expert",),
    "kv_latent": ("expert",),
}
STORAGE = ("embed", "expert_embed", "q_latent", "kv_latent")

# A mesh for inference has these axes only, and moves tokens, never weights: they rest where they
# are used. Dense ones are split over `model` and else repeated; where that takes too much memory,
# `model` is to be larger. In attention tokens are spread over all devices, as their cache is.
INFERENCE_AXES = ("replica", "expert", "model")
INFERENCE_LAYOUT: Mapping[str, tuple[str, ...]] = {
    "batch": ("replica", "expert"),
    "cache": ("replica", "expert", "model"),
    "vocab": ("model",),
    "heads": ("model",),
    "heads_of_row": ("model",),
    "ffw": ("model",),
    "shared_ffw": ("model",),
    "expert_ffw": ("model",),
    "experts": ("expert",),
}


def split(axis: str | None, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes that split a logical axis.

    Args:
        axis: its name; None: no axis of a parameter.
        sizes: of the mesh axes; empty where there is no mesh. Without `data` it is a mesh for
            inference. A storage axis that these would leave whole is split over `data`.
    """
    if sizes and "data" not in sizes:
        return INFERENCE_LAYOUT.get(axis or "", ())
    axes = LAYOUT.get(axis or "", ())
    alone = axis in STORAGE and sizes and all(sizes[name] == 1 for name in axes)
    return ("data",) if alone else axes


assert {axis for axes in LAYOUT.values() for axis in axes} <= set(MESH_AXES)
assert set(INFERENCE_LAYOUT) <= set(LAYOUT)
