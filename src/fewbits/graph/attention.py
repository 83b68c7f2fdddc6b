"""Which layers make queries and keys, read off the data flow."""

from __future__ import annotations

from fewbits.graph.types import Call, Graph


def score_products(graph: Graph) -> dict[int, list[Call]]:
    """Index of a weighted call -> the products of queries and keys that its output goes into.

    On the way may lie anything but another layer, a product or a residual add: splits into heads, rotary embeddings,
    norms, biases. A layer that makes queries, keys and values at once is among them.
    """
    flow = graph.flow
    found: dict[int, list[Call]] = {}
    for product in graph.calls:
        if not flow.is_query_key(product):
            continue
        frontier = list(flow.reads[product.index])
        seen: set[int] = set()
        while frontier:
            value = frontier.pop()
            made = flow.maker(value)
            if value in seen or value not in flow.deep or made is None:
                continue
            seen.add(value)
            if flow.is_weighted(made):
                products = found.setdefault(made.index, [])
                if product not in products:
                    products.append(product)
            elif not flow.is_residual(made) and flow.attention_side(made) is None:
                frontier.extend(flow.reads[made.index])
    return found
