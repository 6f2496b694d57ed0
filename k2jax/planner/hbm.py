"""Bytes on a device in a training step: what stays, and the worst moment of what comes and goes."""

from k2jax.ops.limits import LOGITS_BYTES
from k2jax.params.kimi import declare_kimi
from k2jax.params.spec import ParamSpec
from k2jax.planner import newton
from k2jax.planner.partition import device_size
from k2jax.planner.step_flops import Case
from k2jax.sharding.table import STORAGE


def arguments(case: Case) -> dict[str, float]:
    """What a step is given and gives back: weights, optimizer state, the batch."""
    specs = declare_kimi(case.model)
    rest = {name: device_size(leaf, case.mesh) for name, leaf in specs.items()}
    muon = case.run.optim.name == "muonclip"
    momentum = 4 if case.run.optim.momentum_dtype == "float32" else 2
    state = {
        name: (momentum if muon and specs[name].group == "muon" else 8) * size
        for name, size in rest.items()
        if specs[name].group != "bias"
    }
    return {
        "weights": 4 * sum(rest.values()),
        "optimizer": sum(state.values()),
        "batch": 20 * case.tokens * case.accumulate,
    }


def moments(case: Case) -> dict[str, dict[str, float]]:
    """What is there besides the arguments, at each moment that may be the worst.

    Keys: "layers" (the backward pass of one layer), "head", "between" (head and the backward pass
    of layers), "optimizer".
    """
    specs = declare_kimi(case.model)
    trained = sum(device_size(leaf, case.mesh) for leaf in specs.values() if leaf.group != "bias")
    gradients = 4 * trained * (2 if case.accumulate > 1 else 1)
    kept = {"kept activations": activations(case)} | _cast_weights(case) | _turned_weights(case)
    head = specs["head"]
    whole = case.width * device_size(head, case.mesh, gathered=True)
    attention = _attention(case)
    # A layer is made again as a whole: what its attention keeps waits for the experts' gradients.
    experts = _experts(case) | {"queries and keys": attention["queries and keys"] / 2}
    busiest = max(attention, experts, key=lambda parts: sum(parts.values()))
    layers = {"gradients": gradients} | kept | _layer_weights(case)
    return {
        "layers": layers | busiest,
        "head": kept | {"head": whole} | _logits(case),
        "between": kept | _turned_stack(case) | _logits(case),
        "optimizer": {"gradients": gradients} | newton.moment(case, trained),
    }


def activations(case: Case) -> float:
    """Kept on the device from the forward pass for the backward one, all layers."""
    cfg, tokens = case.model, case.tokens
    layer = cfg.embed * tokens
    if case.run.train.remat == "full":
        return case.width * case.layers * layer
    if case.run.train.remat == "offload":
        return case.width * 2 * layer  # one on its way, one in use
    if case.run.train.remat == "none":
        return case.width * (_intermediates(case) + _kept_weights(case))
    queries = cfg.q_rank + cfg.heads * (cfg.nope + cfg.rope) / case.mesh.model
    keys: float = cfg.kv_rank + cfg.rope
    keys += cfg.heads * (cfg.nope + cfg.value) / case.mesh.model
    products = tokens * (queries + keys + cfg.embed)
    dense = tokens * (2 * cfg.ffw / case.mesh.model + cfg.embed)
    shared = tokens * (2 * cfg.shared_ffw / case.mesh.model + cfg.embed)
    kept = case.layers * (layer + products) + cfg.dense_layers * dense + case.mixtures * shared
    return case.width * kept


def _intermediates(case: Case) -> float:
    """Numbers that the backward pass reads if nothing is made again.

    Scores always are; so is what an exchange makes, but for the rows that come back.
    """
    cfg, tokens, model = case.model, case.tokens, case.mesh.model
    heads = 2 * cfg.heads / model * (cfg.nope + cfg.rope + cfg.value)
    rows = 6 if case.width == 4 else 10  # norms read and keep float32
    attention = tokens * (rows * cfg.embed + heads + 3 * (cfg.q_rank + cfg.kv_rank))
    dense = tokens * 6 * cfg.ffw / model
    shared = tokens * 6 * cfg.shared_ffw / model
    if case.exchanges:
        experts = cfg.experts_per_token * tokens * cfg.embed
    else:
        widths = 7 if case.width == 4 else 9  # two are float32
        experts = case.pairs * (cfg.embed + widths * case.hidden)
        experts += case.mesh.expert * tokens * cfg.embed
    layers = case.layers * attention + cfg.dense_layers * dense
    return layers + case.mixtures * (shared + experts)


def _kept_weights(case: Case) -> float:
    """Numbers of experts' weights, as they are used: gathered and cast. Others are made again."""
    return sum(
        device_size(leaf, case.mesh, gathered=True)
        for leaf in declare_kimi(case.model).values()
        if _stays(case, leaf)
    )


def _stays(case: Case, leaf: ParamSpec) -> bool:
    """Whether what is made of a weight is kept for the backward pass."""
    used, stored = (device_size(leaf, case.mesh, gathered) for gathered in (True, False))
    moved = case.width < 4 or used > stored
    return case.run.train.remat == "none" and leaf.routed and moved


def _cast_weights(case: Case) -> dict[str, float]:
    """Weights of all layers in the compute dtype, as they rest.

    A layer casts its own, but the TPU compiler casts those of all layers before it loops over them,
    and keeps them for the backward pass. No barrier between the two holds it off.
    """
    if case.chip != "tpu" or case.width == 4:
        return {}
    numbers = sum(device_size(leaf, case.mesh) for leaf in _stacked(case))
    return {"cast weights": case.width * numbers}


def _is_turned(case: Case, leaf: ParamSpec) -> bool:
    """Whether the GPU compiler turns a weight so that the axis which is gathered comes first.

    A gather puts devices' parts one after another.
    """
    if case.chip != "gpu" or leaf.axes[1] in STORAGE:
        return False
    return device_size(leaf, case.mesh, gathered=True) > device_size(leaf, case.mesh)


def _turned_weights(case: Case) -> dict[str, float]:
    """Weights of all layers once more, as they rest, turned for gathering.

    A layer gathers its own, but the GPU compiler turns those of all layers before it loops over
    them, and keeps them for the backward pass.
    """
    turned = [leaf for leaf in _stacked(case) if _is_turned(case, leaf) and not _stays(case, leaf)]
    numbers = sum(device_size(leaf, case.mesh) for leaf in turned)
    return {"turned weights": 4 * numbers} if numbers else {}


def _turned_stack(case: Case) -> dict[str, float]:
    """The largest stack of kept weights once more: between the passes it is turned back.

    Weights of gate and up are one stack.
    """
    turned = [leaf for leaf in _stacked(case) if _is_turned(case, leaf) and _stays(case, leaf)]
    stacks = [
        device_size(leaf, case.mesh, gathered=True) * (2 if leaf.axes[-1] == "expert_ffw" else 1)
        for leaf in turned
    ]
    return {"turned stack": case.width * max(stacks, default=0.0)}


def _layer_weights(case: Case) -> dict[str, float]:
    """One mixture layer's weights that are not kept, gathered and cast, and all its gradients."""
    used = [
        (leaf, device_size(leaf, case.mesh, gathered=True) / leaf.shape[0])
        for leaf in _stacked(case)
    ]
    weights = sum(size for leaf, size in used if not _stays(case, leaf))
    gradients = sum(size for _, size in used)
    routed = sum(size for leaf, size in used if leaf.routed)
    # Experts' gradients add up in float32 over the rounds of an exchange, beside a round's own.
    summed = {"summed gradients": 4 * routed} if case.chip == "gpu" and case.exchanges else {}
    parts = {"layer weights": case.width * weights, "layer gradients": case.width * gradients}
    return parts | summed


def _stacked(case: Case) -> list[ParamSpec]:
    """The matrices of the mixture layers, each for all of them."""
    named = declare_kimi(case.model).items()
    return [leaf for name, leaf in named if name.startswith("layers.") and leaf.contracted]


def _attention(case: Case) -> dict[str, float]:
    """Queries, keys, values and what goes back through them; scores where they are whole."""
    cfg, mesh = case.model, case.mesh
    heads = cfg.heads / mesh.model
    rows = 2 * heads * case.tokens * (cfg.nope + cfg.rope + cfg.value)
    parts = {"queries and keys": 2 * case.width * rows}
    if not case.blocks:
        # float32 weights and their gradients, and one of them cast for the products.
        scores = heads * case.tokens * case.run.data.context
        parts["scores"] = (4 + 4 + case.width) * scores
    return parts


def _experts(case: Case) -> dict[str, float]:
    """Rows sorted by expert with their hidden widths, and the gradients of both.

    An exchange has a row a choice where tokens are, and one where experts are: of both the inputs,
    the gradients of outputs and the gradients of inputs.
    """
    cfg, width = case.model, case.width
    widths = 2 if case.run.train.remat == "none" else 4  # the gradients, and what is made again
    copies, each = (3, cfg.experts_per_token) if case.exchanges else (2, case.mesh.expert)
    return {
        "expert rows": width * copies * case.pairs * cfg.embed,
        "expert hidden": width * widths * case.pairs * case.hidden,
        "travelling tokens": width * copies * each * case.tokens * cfg.embed,
    }


def _logits(case: Case) -> dict[str, float]:
    """Float32 logits of a part, their exponentials, and their gradient in the compute dtype."""
    held = case.predictions * case.logits if case.logits <= LOGITS_BYTES else LOGITS_BYTES
    return {"logits": (2 + case.width / 4) * held}


def peak(case: Case) -> float:
    """Bytes at the worst moment."""
    return sum(arguments(case).values()) + max(
        sum(parts.values()) for parts in moments(case).values()
    )


def saving(case: Case, devices_per_host: int) -> float:
    """Bytes of host memory that a background save takes: a copy of the state of its devices."""
    held = arguments(case)
    return devices_per_host * (held["weights"] + held["optimizer"])


def offloaded(case: Case, devices_per_host: int) -> float:
    """Bytes of host memory where layers' inputs wait for the backward pass."""
    if case.run.train.remat != "offload":
        return 0.0
    return devices_per_host * case.width * case.layers * case.model.embed * case.tokens
