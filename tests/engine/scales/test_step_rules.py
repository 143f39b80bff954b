"""Rules of the end-to-end steps: means, codes that are held, shared squares, rates, and tokens that weigh less."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.engine.scales.test_tuning import begin, change_by_autograd, make_task
from workers.engine.scales.memory_plan import Fit
from workers.engine.scales.moving_codes import IntegerAxis, MovingCodes
from workers.engine.scales.step_rules import Mean, StepRules, Turns
from workers.engine.scales.tuning import ScaleTuning, rates, warm_up

CODES = Fit(4, 0, codes=True)


def codes_at(place: Tensor) -> MovingCodes:
    codes = MovingCodes(len(place), IntegerAxis(2), torch.zeros(place.shape))
    codes.place.copy_(place)
    return codes


def test_a_mean_is_that_of_the_last_results_and_before_them_the_last_one() -> None:
    tensor = torch.zeros(3)
    results = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    mean = Mean([tensor], first=5)
    for count, result in enumerate(results, 1):
        tensor.copy_(result)
        mean.add(torch.tensor(count))
        expected = result if count <= 5 else results[5:count].mean(0)
        torch.testing.assert_close(mean._means[0], expected)
    mean.put()
    torch.testing.assert_close(tensor, results[5:].mean(0))


def held_by_hand(path: list[float], limit: int) -> list[float]:
    """Codes of one weight that goes along a path until it is held."""
    found, before, mean, side, turns = [], round(path[0]), float(round(path[0])), 0, 0
    for place in path[1:]:
        index = min(3, max(0, round(place)))
        if turns >= limit:
            found.append(float(before))
            continue
        mean += 0.05 * (index - mean)
        change = (index > before) - (index < before)
        turns += change * side < 0
        side = change or side
        before = round(mean) if turns >= limit else index
        found.append(float(before))
    return found


def test_a_code_that_turns_back_often_enough_is_held_at_the_mean_of_what_it_was() -> None:
    generator = torch.Generator().manual_seed(1)
    paths = (1.5 + 0.9 * torch.randn(60, 8, 4, generator=generator)).clamp(-0.4, 3.4)
    codes = codes_at(paths[0])
    turns, found = Turns(codes, 4), []
    for places in paths[1:]:
        codes.place.copy_(places)
        turns.hold()
        found.append(codes.indices(slice(None)).clone())
    expected = torch.tensor([held_by_hand(path.tolist(), 4) for path in paths.flatten(1).T]).T.view(59, 8, 4)
    assert torch.equal(torch.stack(found), expected)
    assert torch.equal(found[-1], found[-20])
    assert len(found[-1].unique()) > 1


def test_shared_squares_move_a_weight_by_its_part_of_its_groups_gradient() -> None:
    codes = codes_at(torch.full((2, 4), 1.5))
    codes.share_squares()
    gradient = torch.tensor([[4.0, 0.0, 0.0, 0.0], [1.0, -1.0, 1.0, -1.0]])
    codes.gradient.copy_(gradient)
    unbiased = torch.tensor(0.1), torch.tensor(0.05)
    codes.move(torch.tensor(0.2), unbiased, (0.9, 0.95))
    expected = 1.5 - 0.1 * gradient / gradient.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(codes.place, expected)


def test_rates_of_codes_end_early_and_those_of_all_on_a_floor() -> None:
    plain, warmed = rates(100), warm_up(100)
    assert torch.equal(StepRules().of_codes(plain), plain)
    settled = StepRules(settled=0.6).of_codes(plain)
    torch.testing.assert_close(settled[20:60], warmed[20:60] * (1 - torch.arange(20, 60) / 60).double())
    assert not settled[60:].any()
    floor = StepRules(floor=0.25).with_floor(plain, warmed)
    torch.testing.assert_close(floor[-1], 0.25 * warmed[-1] + 0.75 * plain[-1])
    torch.testing.assert_close(floor[50], torch.tensor(0.625 * 0.002, dtype=torch.float64))


@pytest.mark.parametrize("rules", [StepRules(bounded=0.01), StepRules(trimmed=0.3)])
def test_the_gradient_is_that_of_the_weighed_loss(rules: StepRules, tmp_path: Path) -> None:
    task, batch = make_task(tmp_path, "llama", torch.float64), torch.tensor([4, 0, 3, 1])
    task = replace(task, rules=rules)

    def of_token(each: Tensor) -> Tensor:
        if rules.bounded:
            return rules.bounded * (1 + each / rules.bounded).log()
        left_out = each.flatten().detach().topk(round(0.3 * each.numel())).indices
        return each.flatten().index_fill(0, left_out, 0)

    def check(tuning: ScaleTuning) -> None:
        scales = tuning.blocks.scales
        changes = {n: scales.change[p.overall].view(p.shape[0], -1).double() for n, p in scales.places.items()}
        expected = change_by_autograd(tmp_path, task, changes, batch, of_token)[1]
        found, largest = tuning.gradient(batch), float(max(each.abs().max() for each in expected.values()))
        for name, place in scales.places.items():
            mine = found[place.overall].view_as(expected[name])
            torch.testing.assert_close(mine, expected[name], rtol=1e-5, atol=1e-5 * largest)

    begin(task, Fit(4, 0), check)


def test_a_stage_keeps_the_mean_of_its_last_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(tmp_path, "llama", steps=8)
    task = replace(task, codes=True, rules=StepRules(averaged=0.5, floor=1, turns=1))
    kept: list[list[Tensor]] = []

    def check(tuning: ScaleTuning) -> None:
        scales, step = tuning.blocks.scales, tuning.step
        tensors = [scales.change, *(codes.place for codes in scales.moving)]
        assert len(tensors) > 1
        assert len(tuning.damped) == len(scales.moving)

        def watched() -> None:
            step()
            kept.append([tensor.clone() for tensor in tensors])

        monkeypatch.setattr(tuning, "step", watched)
        before = [tensor.clone() for tensor in tensors]
        tuning.run()
        for number, tensor in enumerate(tensors):
            torch.testing.assert_close(tensor, torch.stack([each[number] for each in kept[4:]]).mean(0))
            assert not torch.equal(tensor, before[number])
        written = {name: scales.families[p.family].value[p.groups].clone() for name, p in scales.places.items()}
        scales.write()
        for name, place in scales.places.items():
            assert torch.equal(written[name], scales.families[place.family].value[place.groups])

    begin(task, CODES, check)
