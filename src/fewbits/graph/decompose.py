"""Composite calls written out in plain torch ops, so that the products and softmaxes inside them become sites.

Each rule is called with the mode re-entered and must never call its own original: it would recurse for ever.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` as product, softmax, product. Shapes (..., heads, tokens, width)."""
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query, key.transpose(-2, -1)) * factor
    dead = None
    if is_causal:
        keep = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~keep, float("-inf"))
    elif attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask
        dead = (scores == float("-inf")).all(-1, keepdim=True)
    probabilities = torch.softmax(scores, -1)
    if dead is not None:  # a row with every key masked attends to nothing, as in torch's own kernels
        probabilities = probabilities.masked_fill(dead, 0.0)
    if dropout_p > 0.0:
        probabilities = F.dropout(probabilities, dropout_p, True)
    return torch.matmul(probabilities, value)


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` in plain ops. Shapes (tokens, batch, width) or (tokens, width)."""
    unbatched = query.dim() == 2
    same = key is query and value is query
    same_kv = value is key
    if unbatched:
        query = query.unsqueeze(1)
        key = query if same else key.unsqueeze(1)
        value = key if same_kv else value.unsqueeze(1)
    if use_separate_proj_weight:
        assert q_proj_weight is not None and k_proj_weight is not None and v_proj_weight is not None
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b)
            for x, w, b in zip((query, key, value), (q_proj_weight, k_proj_weight, v_proj_weight), biases, strict=True)
        )
    else:
        assert in_proj_weight is not None
        if same:
            q, k, v = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, dim=-1)
        else:
            weights = in_proj_weight.chunk(3)
            biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    length, batch, width = q.shape
    head = width // num_heads
    q = q.reshape(length, batch, num_heads, head).permute(1, 2, 0, 3)
    k = k.reshape(k.shape[0], batch, num_heads, head).permute(1, 2, 0, 3)
    v = v.reshape(v.shape[0], batch, num_heads, head).permute(1, 2, 0, 3)
    scores = torch.matmul(q * (head**-0.5), k.transpose(-2, -1))
    mask = _merge_masks(attn_mask, key_padding_mask, batch, num_heads, scores)
    if mask is not None:
        scores = scores + mask
    probabilities = torch.softmax(scores, -1)
    if training and dropout_p > 0.0:
        probabilities = F.dropout(probabilities, dropout_p, True)
    out = torch.matmul(probabilities, v).permute(2, 0, 1, 3).reshape(length, batch, width)
    out = F.linear(out, out_proj_weight, out_proj_bias)
    weights_out = None
    if need_weights:
        weights_out = probabilities.mean(1) if average_attn_weights else probabilities
    if unbatched:
        out = out.squeeze(1)
        weights_out = None if weights_out is None else weights_out.squeeze(0)
    return out, weights_out


def _merge_masks(
    attn_mask: Tensor | None, padding: Tensor | None, batch: int, heads: int, scores: Tensor
) -> Tensor | None:
    """One additive mask that broadcasts to (batch, heads, queries, keys). Boolean True means masked, as in torch."""

    def additive(mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            return mask.to(scores.dtype)
        return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, float("-inf"))

    merged = None
    if attn_mask is not None:
        merged = additive(attn_mask)
        if merged.dim() == 3:
            merged = merged.view(batch, heads, *merged.shape[1:])
    if padding is not None:
        pad = additive(padding)
        pad = (pad.unsqueeze(0) if pad.dim() == 1 else pad).view(batch, 1, 1, -1)
        merged = pad if merged is None else merged + pad
    return merged


def _einsum_labels(equation: str, dims: tuple[int, ...]) -> tuple[list[str], list[str], list[str]]:
    """Labels of both operands and of the output, the ellipsis written out. Raises ValueError for what is no plain
    product.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2 or len(dims) != 2:
        raise ValueError("not a product of two tensors")
    spare = [chr(code) for code in range(0x3B1, 0x3B1 + 24)]

    def expand(term: str, size: int) -> list[str]:
        head, dots, tail = term.partition("...")
        hidden = size - len(head) - len(tail) if dots else 0
        return [*head, *spare[len(spare) - hidden :], *tail]

    first, second = (expand(term, size) for term, size in zip(terms, dims, strict=True))
    if arrow:
        hidden = max(sum(label in spare for label in labels) for labels in (first, second))
        head, dots, tail = right.partition("...")
        out = [*head, *(spare[len(spare) - hidden :] if dots else []), *tail]
    else:
        counts = [*first, *second]
        out = sorted(label for label in set(counts) if counts.count(label) == 1)
    if any(len(set(labels)) != len(labels) for labels in (first, second, out)):
        raise ValueError("repeated labels")
    return first, second, out


def einsum(equation: str, *operands: Any) -> Tensor:
    """`torch.einsum` of two tensors as one (batched) matrix product."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    a, b = operands
    first, second, out = _einsum_labels(equation, (a.dim(), b.dim()))
    for labels, other in ((first, second), (second, first)):
        for label in [x for x in labels if x not in other and x not in out]:
            if labels is first:
                a = a.sum(first.index(label))
            else:
                b = b.sum(second.index(label))
            labels.remove(label)
    batch = [x for x in first if x in second and x in out]
    inner = [x for x in first if x in second and x not in out]
    rows = [x for x in first if x not in second]
    columns = [x for x in second if x not in first]
    a = a.permute([first.index(x) for x in (*batch, *rows, *inner)])
    b = b.permute([second.index(x) for x in (*batch, *inner, *columns)])
    row_sizes, column_sizes = a.shape[len(batch) : len(batch) + len(rows)], b.shape[len(batch) + len(inner) :]
    a = a.reshape(*a.shape[: len(batch)], math.prod(row_sizes), math.prod(a.shape[len(batch) + len(rows) :]))
    b = b.reshape(*b.shape[: len(batch)], a.shape[-1], math.prod(column_sizes))
    product = torch.matmul(a, b)
    product = product.reshape(*product.shape[: len(batch)], *row_sizes, *column_sizes)
    made = [*batch, *rows, *columns]
    return product.permute([made.index(x) for x in out])


def can_open(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a composite call's options are ones that its rule covers."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if any(x.is_nested for x in tensors):
        return False
    if op == "multi_head_attention_forward":
        names = dict(zip(_MHA_NAMES, args, strict=False)) | kwargs
        return not names.get("add_zero_attn") and all(
            names.get(k) is None for k in ("bias_k", "bias_v", "static_k", "static_v")
        )
    if op == "einsum":
        operands = args[1:] if len(args) != 2 or isinstance(args[1], Tensor) else tuple(args[1])
        if (
            len(operands) != 2
            or not isinstance(args[0], str)
            or not all(isinstance(x, Tensor) and x.is_floating_point() for x in operands)
        ):
            return False
        try:
            first, second, out = _einsum_labels(args[0], (operands[0].dim(), operands[1].dim()))
        except ValueError:
            return False
        return any(x in second and x not in out for x in first) and set(out) <= set(first) | set(second)
    return True


_MHA_NAMES = tuple(inspect.signature(multi_head_attention).parameters)

RULES: dict[str, Callable[..., Any]] = {
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    "multi_head_attention_forward": multi_head_attention,
}
