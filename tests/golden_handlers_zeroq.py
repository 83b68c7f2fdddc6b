"""Golden cases of ZeroQ: its quantizer, and the loss that its images are optimised for."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.datagen import InputMatching, Pixels, Plateau, StatisticsMatching, optimise_images, stored_statistics
from fewbits.formats import PerChannel, PerTensor
from fewbits.papers.zeroq import asymmetric
from fewbits.quantizer import Quantizer
from fewbits.ranges import MinMax
from fewbits.recipe import QSpec


def quantizer(data: dict) -> None:
    checked = 0
    for bits in (int(found[1]) for key in data if (found := re.fullmatch(r"w_scale_b(\d+)", key))):
        rows = Quantizer(QSpec(asymmetric(bits), PerChannel(0), MinMax()), "weight")
        rows.calibrate(data["w_conv"])
        torch.testing.assert_close(1 / rows.params["scale"].flatten(), data[f"w_scale_b{bits}"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(-rows.params["zero_point"].flatten(), data[f"w_zp_b{bits}"], rtol=0, atol=0)
        for name in ("w_conv", "w_lin"):
            rows = Quantizer(rows.spec, name)
            rows.calibrate(data[name])
            _same(rows(data[name]), data[f"{name}_q_b{bits}"])
            _same(rows.decode(rows.encode(data[name])), data[f"{name}_q_b{bits}"])
        whole = QSpec(asymmetric(bits), PerTensor(), MinMax())
        for suffix, top in (("q", data["act"].max()), ("q_clip2", torch.tensor(2.0))):
            act = Quantizer(whole, "act")
            act.set_params(whole.format.from_range(torch.tensor(0.0), top))
            _same(act(data["act"]), data[f"act_{suffix}_b{bits}"])
        checked += 1
    assert checked


def _same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


class Net(nn.Module):
    """conv - norm - relu - conv (stride 2) - norm - relu - mean - linear."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        first, second, last = (state[f"{name}.weight"] for name in ("conv1", "conv2", "fc"))
        self.conv1 = nn.Conv2d(first.shape[1], first.shape[0], first.shape[2], padding=1, bias=False)
        self.conv2 = nn.Conv2d(second.shape[1], second.shape[0], second.shape[2], 2, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(first.shape[0]), nn.BatchNorm2d(second.shape[0])
        self.fc = nn.Linear(last.shape[1], last.shape[0])
        self.load_state_dict({**state, "bn1.num_batches_tracked": torch.tensor(0),
                              "bn2.num_batches_tracked": torch.tensor(0)})  # fmt: skip
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def distill_loss(data: dict) -> None:
    net = Net({key.removeprefix("net."): value for key, value in data.items() if key.startswith("net.")})
    seen: dict[str, list[Tensor]] = {}
    targets = {}
    for name in ("bn1", "bn2"):
        norm = net.get_submodule(name)
        norm.register_forward_pre_hook(lambda module, args, name=name: seen.setdefault(name, []).append(args[0]))
        targets[name] = stored_statistics(norm.running_mean, norm.running_var)
    objectives = [StatisticsMatching(targets), InputMatching()]

    def look(x: Tensor) -> dict[str, list[Tensor]]:
        seen.clear()
        net(x)
        return dict(seen)

    start = data["x0"].clone().requires_grad_()
    loss = torch.stack([objective(0, start, look(start)) for objective in objectives]).sum()
    (gradient,) = torch.autograd.grad(loss, start)
    torch.testing.assert_close(gradient, data["grad_first"], rtol=1e-4, atol=1e-6)
    (steps,) = (int(key.rpartition("_")[2]) for key in data if key.startswith("x_after_"))
    images, history = optimise_images(
        Pixels(data["x0"]), look, objectives, iterations=steps, lr=0.5, schedule=Plateau(0.5)
    )
    torch.testing.assert_close(history, data["losses"][:steps], rtol=1e-4, atol=0)
    torch.testing.assert_close(images, data[f"x_after_{steps}"], rtol=1e-3, atol=1e-3)


HANDLERS = {"zeroq": {"asymmetric_quantizer": quantizer, "distill_loss": distill_loss}}
