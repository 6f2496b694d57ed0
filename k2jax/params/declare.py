"""Declare parameters: one line gives shape, layout, init, optimizer group and published name.

Parameters are one flat dict of arrays with dotted names ("layers.attention.q_up"). A declaration
is a plain object whose attributes are `ParamSpec`s or further such objects; `specs` lists them.
"""

from collections.abc import Iterator
from typing import Any

from k2jax.config import ModelConfig
from k2jax.params.spec import ParamSpec


class Declare:
    """Declares the parameters of one module: `declare("q_latent heads qk", 1, "q_b_proj")`.

    Args:
        cfg: gives each axis its length.
        stack: axis that stacks layers of this kind, or "" for what stands alone.
        prefix: start of the published names.
    """

    def __init__(self, cfg: ModelConfig, stack: str = "", prefix: str = ""):
        self.cfg, self.stack, self.prefix = cfg, stack, prefix

    def __call__(
        self,
        axes: str,
        contracted: int,
        published: str,
        init: str = "",
        copies: tuple[str, ...] = (),
    ) -> Any:
        """A parameter whose first `contracted` matrix dims meet the input.

        0 means no matrix: a gain (`init` "ones", the default) or a table of rows ("normal").

        Returns:
            A ParamSpec; bound, its attribute is an `nnx.Param`.
        """
        names = tuple(axes.split())
        return self._declare(
            names,
            contracted,
            f"{published}.weight",
            group="muon" if contracted and "vocab" not in names else "adam",
            init=init or ("normal" if contracted else "ones"),
            copies=copies,
        )

    def bias(self, axes: str, published: str) -> Any:
        """A float32 bias outside of gradients and weight decay."""
        return self._declare(tuple(axes.split()), 0, published, group="bias", init="zeros")

    def _declare(
        self,
        axes: tuple[str, ...],
        contracted: int,
        published: str,
        *,
        group: str,
        init: str,
        copies: tuple[str, ...] = (),
    ) -> ParamSpec:
        before = {"moe_layers": self.cfg.dense_layers, "mtp_layers": self.cfg.layers}
        axes = (self.stack, *axes) if self.stack else axes
        return ParamSpec(
            axes=axes,
            shape=tuple(map(self.cfg.size, axes)),
            contracted=contracted,
            group=group,
            published=self.prefix + published,
            dtype="float32" if group == "bias" else "bfloat16",
            first_layer=before.get(self.stack, 0),
            init=init,
            copies=copies,
        )


def specs(declared: object) -> dict[str, ParamSpec]:
    """Name and declaration of every parameter, sorted by name."""
    return dict(sorted(_walk(declared)))


def _walk(declared: object, prefix: str = "") -> Iterator[tuple[str, ParamSpec]]:
    for name, value in vars(declared).items():
        if isinstance(value, ParamSpec):
            yield prefix + name, value
        else:
            yield from _walk(value, f"{prefix}{name}.")
