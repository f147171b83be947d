"""Gradients through the whole model by autograd: what the backward pass, one layer at a time, is
compared with."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel


def at_routed_outputs(
    model: PreTrainedModel, token_ids_BS: Tensor, label: Callable[[Tensor], Tensor]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Gradients of the summed cross-entropy, by layer: at the output of its routed experts, and at
    what enters it (num_layers: the final norm); (T, H) each.

    `label` makes labels of the model's own probabilities (T, V).
    """
    routed: dict[int, Tensor] = {}
    entering: dict[int, Tensor] = {}
    hooks = []
    for number, layer in enumerate(model.model.layers):

        def enter(_module: object, args: tuple[Tensor, ...], number: int = number) -> None:
            entering[number] = args[0]

        hooks.append(layer.register_forward_pre_hook(enter))
        if hasattr(layer.mlp, "experts"):

            def record(_module: object, _args: object, out: Tensor, number: int = number) -> None:
                routed[number] = out

            hooks.append(layer.mlp.experts.register_forward_hook(record))

    def enter_norm(_module: object, args: tuple[Tensor, ...]) -> None:
        entering[len(model.model.layers)] = args[0]

    hooks.append(model.model.norm.register_forward_pre_hook(enter_norm))
    embedded = model.model.embed_tokens(token_ids_BS).detach().requires_grad_(True)
    logits_TV = model(inputs_embeds=embedded, use_cache=False).logits.flatten(0, 1)
    for hook in hooks:
        hook.remove()
    labels_T = label(logits_TV.detach().softmax(-1))
    loss = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")
    found = [
        g.flatten(0, -2) for g in torch.autograd.grad(loss, [*routed.values(), *entering.values()])
    ]
    return dict(zip(routed, found, strict=False)), dict(
        zip(entering, found[len(routed) :], strict=True)
    )
