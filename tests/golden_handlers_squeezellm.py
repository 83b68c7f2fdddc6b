"""What each golden case of SqueezeLLM must reproduce: all exactly, but the clustering, which must be as good."""

from __future__ import annotations

import torch

from fewbits.formats import Codebook, PerChannel, encode
from fewbits.kernels.words import pack_words, unpack_words
from fewbits.outliers.dense_sparse import outlying_values, quartile_threshold, sensitive_values
from fewbits.outliers.parts import Sparse
from fewbits.ranges import KMeans, inertia
from golden_handlers_parts import close


def dense_and_sparse(data: dict) -> None:
    weight, fisher, bits = data["W"], data["grad_sq"], data["bits"]
    moved = torch.zeros_like(weight, dtype=torch.bool)
    if "outlier_values" in data:
        moved |= sensitive_values(fisher, data["sensitivity_percent"])
        if data["range"] >= 0:
            threshold = quartile_threshold(weight, data["range"])
            assert abs(float(threshold) / data["threshold"] - 1) < 1e-6
            moved |= outlying_values(weight, threshold)
        assert torch.equal(weight * moved, data["outlier_values"])
    dense = weight.masked_fill(moved, 0)
    assert torch.equal(dense, data["W_dense_in"])

    # their clustering, through our codebook: ascending tables, so labels are renamed
    sensitivity = fisher * (dense != 0)
    sensitivity = torch.where(sensitivity.sum(1, keepdim=True) > 0, sensitivity, torch.ones_like(sensitivity))
    order = data["centers"].argsort(dim=1)
    table = data["centers"].gather(1, order).T.unsqueeze(-1).contiguous()
    fmt = Codebook(bits)
    labels = encode(dense, fmt, PerChannel(0), {"table": table})
    renamed = order.argsort(dim=1).gather(1, data["labels"].long())
    ours = table[labels.long(), torch.arange(len(weight))[:, None], 0]
    theirs = data["centers"].gather(1, data["labels"].long())
    tied = ((dense - ours).abs() - (dense - theirs).abs()).abs() <= 1e-6 * weight.abs().max()
    assert bool(((labels == renamed) | tied).all()) and float((labels == renamed).float().mean()) > 0.99
    close(inertia(dense, sensitivity, data["centers"]), data["weighted_inertia"], rtol=1e-4)

    for exact in (False, True):
        search = KMeans("exact") if exact else KMeans(starts=4)
        found = search.fit_weighted(dense, fisher * (dense != 0), fmt, PerChannel(0))["table"][:, :, 0].T
        ours = inertia(dense, sensitivity, found)
        if exact:
            assert bool((ours <= data["weighted_inertia"] * (1 + 1e-6)).all())
        assert float(ours.sum()) <= 1.05 * float(data["weighted_inertia"].sum())

    close(data["lookup_table"], data["centers"])
    words = pack_words(data["labels"].int(), bits)
    assert words.dtype == data["packed_qweight"].dtype and torch.equal(words, data["packed_qweight"])
    assert torch.equal(unpack_words(words, bits, weight.shape[1]), data["labels"].to(torch.uint8))

    emitted = data["centers"].gather(1, data["labels"].long())
    sparse = Sparse.from_dense(weight - emitted, moved)
    whole = sparse.apply(emitted)
    if "csr_vals" in data:
        assert torch.equal(sparse.rows, data["csr_rows"]) and torch.equal(sparse.columns, data["csr_cols"])
        close(sparse.values, data["csr_vals"], atol=1e-7)
        nearest_zero = data["centers"].gather(1, data["centers"].abs().argmin(1, keepdim=True)).expand_as(weight)
        close(emitted[moved], nearest_zero[moved])
    close(whole, data["W_reconstructed"], atol=1e-7)
    close(whole[moved], weight[moved], atol=1e-8 + 1e-7 * float(weight.abs().max()))


HANDLERS = {"squeezellm": {"dense": dense_and_sparse}}
