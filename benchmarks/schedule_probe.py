import json, sys, torch
from dataclasses import replace
from torch import nn
from app.domain.methods import Scheme, SignRoundSpec
from benchmarks.block_tuning import SHAPES, Shape, make_task, timed
from workers.engine.device.setup import reproducible

def moments(task):
    """Mean squares of each linear's inputs, as a job measures them."""
    sums, hooks = {}, []
    def hook(name):
        def see(_, args): sums[name] = sums.get(name, 0) + args[0].detach().flatten(0, -2).float().square().sum(0)
        return see
    for name in task.schemes:
        hooks.append(task.block.get_submodule(name).register_forward_pre_hook(hook(name)))
    with torch.no_grad():
        for rows in torch.split(task.inputs[:16], 4): task.forward(task.block, rows)
    for h in hooks: h.remove()
    return {name: s / s.mean() for name, s in sums.items()}

def with_correlated_inputs(task):
    """Inputs with eigenvalues that fall as 1/k, as a model's do: where linears have nothing to learn from inputs that are white, here they do."""
    g = torch.Generator(task.device).manual_seed(1)
    width = task.inputs.shape[-1]
    turn = torch.linalg.qr(torch.randn(width, width, device=task.device, generator=g))[0]
    spectrum = torch.arange(1, width + 1, device=task.device).float().rsqrt()
    mix = (turn * (spectrum / spectrum.square().mean().sqrt())) @ torch.linalg.qr(torch.randn(width, width, device=task.device, generator=g))[0]
    hidden = (task.inputs_fp.float().flatten(0, 1) @ mix).to(task.inputs.dtype).view_as(task.inputs_fp)
    with torch.no_grad():
        targets = torch.cat([task.forward(task.block, rows) for rows in torch.split(hidden, 8)])
    return replace(task, inputs_fp=hidden, inputs=hidden + 0.02 * torch.randn_like(hidden), targets=targets)

def main(shape, group, samples, length, device, correlated, cases):
    device = torch.device(device)
    task = make_task(shape, Scheme(bits=4, group_size=group, symmetric=True), samples, length, 8, device, fused=True)
    if correlated:
        task = with_correlated_inputs(task)
        task = replace(task, second_moments=moments(task))
    with reproducible(device):
        for steps, batch, rate in cases:
            for seed in (0,):
                r = timed(replace(task, seed=seed), SignRoundSpec(steps=steps, batch_size=batch, learning_rate=rate and rate / steps, preset="light" if steps < 100 else "default"))
                print(json.dumps({"steps": steps, "batch": batch, "rate": rate, "seed": seed} | r), flush=True)

if __name__ == "__main__":
    if sys.argv[1:] == ["small"]:
        main(Shape(256, 896, 4, 1, 64), 128, 128, 128, "cpu", True, [(100,8,None),(60,8,None),(100,4,None)])
    else:
        main(SHAPES["llama-8b"], 128, 128, 2048, "cuda", True, [(50,8,None),(200,8,None),(150,8,None),(120,8,None),(100,8,None),(200,4,None),(100,8,.7)])
        torch.cuda.empty_cache()
        main(SHAPES["llama-8b"], 128, 128, 2048, "cuda", False, [(200,8,None),(120,8,None),(200,4,None)])
