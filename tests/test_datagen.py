"""Images made from statistics: the objectives and the loop, on plain tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewbits.datagen import (
    InputMatching,
    Pixels,
    Plateau,
    StatisticsMatching,
    feature_statistics,
    integer_noise,
    matching_loss,
    optimise_images,
    stored_statistics,
)
from fewbits.errors import FewbitsError


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """x with exactly these statistics in every sample and channel."""
    mu, sigma = feature_statistics(x, eps=0.0)
    standard = (x - mu[..., None, None]) / sigma[..., None, None]
    return standard * (std**2 - 1e-6).sqrt()[:, None, None] + mean[:, None, None]


@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (3, 5, 6), (2, 5, 2, 3, 2)])
def test_statistics_are_per_sample_over_all_space(shape: tuple[int, ...]) -> None:
    x = rand(*shape) * 2 + 1
    mean, std = feature_statistics(x)
    assert mean.shape == std.shape == shape[:2]
    torch.testing.assert_close(mean, x.flatten(2).mean(2))
    torch.testing.assert_close(std, (x.flatten(2).var(2) + 1e-6).sqrt())
    whole = x.transpose(0, 1).flatten(1)
    for found, wanted in zip(
        feature_statistics(x, "batch"), (whole.mean(1), (whole.var(1) + 1e-6).sqrt()), strict=True
    ):
        torch.testing.assert_close(found, wanted[None])


@pytest.mark.parametrize("shape", [(4, 5, 1, 1), (4, 5)])
def test_features_without_space_are_matched_over_the_batch(shape: tuple[int, ...]) -> None:
    x = rand(*shape).requires_grad_()
    mean, std = feature_statistics(x)
    torch.testing.assert_close(mean, x.flatten(1).mean(0, keepdim=True))
    torch.testing.assert_close(std, (x.flatten(1).var(0, keepdim=True) + 1e-6).sqrt())
    lone = rand(1, 5, *shape[2:]).requires_grad_()
    _, std = feature_statistics(lone)  # one value has no variance: no NaN, and no gradient either
    std.sum().backward()
    assert std.tolist() == [[pytest.approx(1e-3)] * 5] and not bool(lone.grad.any())
    with pytest.raises(FewbitsError, match="samples, channels"):
        feature_statistics(rand(5))


def test_loss_is_zero_only_where_every_sample_has_the_statistics() -> None:
    mean, std = rand(5, seed=1), rand(5, seed=2).abs() + 0.5
    objective = StatisticsMatching({"norm": (mean, std)})
    matched = exact(rand(4, 5, 6, 6), mean, std)
    assert float(objective(0, matched, {"norm": [matched]})) < 1e-9
    batch = StatisticsMatching({"norm": (mean, std)}, per="batch")
    # opposite samples: the batch has the right mean, no sample has
    apart = torch.cat([matched + 1, matched - 1])
    assert float(objective(0, apart, {"norm": [apart]})) == pytest.approx(5.0, rel=1e-4)
    apart_std = feature_statistics(apart, "batch")[1][0]
    loose = StatisticsMatching({"norm": (mean, apart_std)}, per="batch")
    assert float(loose(0, apart, {"norm": [apart]})) < 1e-9 < float(batch(0, apart, {"norm": [apart]}))
    mixed = rand(6, 5, 6, 6)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    torch.testing.assert_close(
        objective(0, mixed, {"norm": [mixed]}), objective(0, mixed[order], {"norm": [mixed[order]]})
    )


def test_loss_compares_standard_deviations_and_counts_every_pass() -> None:
    var = torch.tensor([4.0, 9.0])
    mean, std = stored_statistics(torch.zeros(2), var)
    torch.testing.assert_close(std, (var + 1e-6).sqrt())
    found = (torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 3.0], [4.0, 3.0]]))
    # squared gaps of means 1 and of standard deviations 4 (not variances 144), over two samples
    assert float(matching_loss(found, (mean, std))) == pytest.approx(2.5, rel=1e-5)
    x = rand(3, 2, 4, 4)
    objective = StatisticsMatching({"norm": (mean, std)})
    torch.testing.assert_close(objective(0, x, {"norm": [x, x]}), 2 * objective(0, x, {"norm": [x]}))
    with pytest.raises(FewbitsError, match="norm was not reached"):
        objective(0, x, {})


@pytest.mark.parametrize("channels", [1, 3, 7])
def test_input_term_takes_any_number_of_channels(channels: int) -> None:
    x = exact(rand(2, channels, 5, 5), torch.zeros(channels), torch.ones(channels))
    assert float(InputMatching()(0, x, {})) < 1e-9
    assert float(InputMatching()(0, x + 2, {})) == pytest.approx(4 * channels, rel=1e-4)
    assert float(InputMatching(mean=2.0)(0, x + 2, {})) < 1e-9


def test_start_is_nearly_zero_and_seeded() -> None:
    start = integer_noise((4, 3, 8, 8), torch.Generator().manual_seed(1))
    assert start.equal(integer_noise((4, 3, 8, 8), torch.Generator().manual_seed(1)))
    assert not start.equal(integer_noise((4, 3, 8, 8), torch.Generator().manual_seed(2)))
    assert -0.02353 < float(start.min()) < -0.02 and 0.02 < float(start.max()) < 0.02335
    whole = start * 5418.75 + 127.5
    torch.testing.assert_close(whole, whole.round(), atol=1e-3, rtol=0)


def test_loop_lowers_the_rate_on_a_plateau() -> None:
    plateau = Plateau(0.5, patience=3, minimum=0.02)
    rates = []
    for step in range(20):
        rates.append(0.5 * plateau(step / 20))
        plateau.seen(step, torch.tensor(1.0))
    # the first loss is the best; three more may pass without gain, the next one is too many
    assert (
        rates[:5] == [0.5] * 5 and rates[5:9] == [pytest.approx(0.05)] * 4 and rates[9:] == [pytest.approx(0.02)] * 11
    )
    falling = Plateau(0.5, patience=0)
    for step in range(5):
        falling.seen(step, torch.tensor(1.0 - 0.1 * step))
    assert falling(0.0) == 1.0


class Generator(nn.Module):
    """A source that is not pixels: images from a latent."""

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Parameter(rand(2, 4))
        self.linear = nn.Linear(4, 27)

    def forward(self) -> Tensor:
        return self.linear(self.latent).view(2, 3, 3, 3)


def total_variation(step: int, images: Tensor, seen: dict) -> Tensor:
    return images.diff(dim=-1).square().mean()


@pytest.mark.parametrize("source", ["pixels", "generator"])
def test_loop_takes_any_source_objective_and_augmentation(source: str) -> None:
    def run() -> tuple[Tensor, Tensor, list[int]]:
        torch.manual_seed(0)
        made = Pixels(rand(2, 3, 3, 3, seed=5)) if source == "pixels" else Generator()
        steps: list[int] = []

        def roll(step: int, images: Tensor) -> Tensor:
            steps.append(step)
            return images.roll(step, -1)

        def work_in_place(images: Tensor) -> dict[str, list[Tensor]]:
            return {"features": [images.relu_()]}

        target = {"features": (torch.full((3,), 0.8), torch.full((3,), 0.6))}
        images, history = optimise_images(
            made, work_in_place, [StatisticsMatching(target), InputMatching(), total_variation], iterations=80, lr=0.05,
            schedule="cosine", betas=(0.5, 0.9), augment=roll,
        )  # fmt: skip
        return images, history, steps

    images, history, steps = run()
    assert history.shape == (80,) and steps == list(range(80)) and not images.requires_grad
    assert float(history[-1]) < 0.3 * float(history[0])
    again, same, _ = run()
    assert images.equal(again) and history.equal(same)


def test_an_exploding_loss_is_an_error() -> None:
    with pytest.raises(FewbitsError, match="NaN or infinite"):
        optimise_images(
            Pixels(rand(1, 1, 2, 2)), lambda x: {}, [lambda step, x, seen: (x / 0).sum()], iterations=2, lr=1
        )
