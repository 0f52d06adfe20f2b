"""Section 4.9 with torch: the three-stage hierarchy over a two-dimensional device mesh.

Question   What does a device mesh take off our hands when an all-reduce is split by node, and what does it cost?
Method     The same K processes run our hierarchy over shared memory and torch's over gloo in turns.
Read       Shared memory spares TCP's copies, and gloo's reduce-scatter costs more than its all-reduce, so ours wins.
Source     torch.distributed.device_mesh, gloo backend; Thakur, Rabenseifner & Gropp (2005).
"""
from __future__ import annotations

import numpy as np

from part1_foundations.ch04_communication_primitives.collectives import (
    Group,
    hierarchical,
    node_groups,
    ring,
    ring_all_gather,
    ring_reduce_scatter,
)
from part1_foundations.ch04_communication_primitives.s4_09_hierarchical_all_reduce import buffer_sizes
from part1_foundations.ch04_communication_primitives.timing import slowest, timed
from shared import Run, demo, torch_world
from shared.measure import human_bytes, ratio


@demo("4.9", library="torch (init_device_mesh, mesh sub-groups; gloo)", needs=("torch",),
      handles=("group creation", "rank coordinates", "with NCCL: topology discovery"),
      smoke=dict(nodes=2, per_node=2, mebibytes=0.25, points=2, repeats=5),
      laptop=dict(nodes=2, per_node=2, mebibytes=8, points=5, repeats=11))
def main(run: Run, nodes: int = 2, per_node: int = 2, mebibytes: float = 2.0, points: int = 4, repeats: int = 9,
         wire: str = "shm", seed: int = 0) -> None:
    """Time our hierarchy against torch's on one machine, where the links of all ranks are alike.

    Args:
        nodes: First axis of the mesh.
        per_node: Second axis of the mesh: ranks on each node.
        points: Number of buffer sizes, from 1 KiB up.
        wire: Transport of our side: shm, unix or tcp.
    """
    workers, sizes = nodes * per_node, buffer_sizes(mebibytes, points, nodes * per_node)
    ranks = torch_world.launch(workers, both, nodes, per_node, sizes, repeats, seed, wire=wire, timeout=600)
    rows, seconds = [], {"ours": [], "library": [], "flat": []}
    for size in sizes:
        ours, library, flat = times = [slowest([rank[size]["seconds"][side] for rank in ranks]) for side in seconds]
        rows.append((human_bytes(size), *map(str, times), f"{ratio(library, ours).median:.2f}"))
        for side, timing in zip(seconds, times):
            seconds[side].append(timing.median)
    run.table(f"all-reduce of float32 over {nodes} x {per_node} processes", rows,
              ["buffer", f"ours on {wire}", "torch's hierarchy", "torch's flat call", "torch / ours"])
    run.compare(f"hierarchy, {human_bytes(sizes[-1])}, {workers} processes", ours, library)
    run.lines_of_code(ours=[hierarchical, node_groups, ring_reduce_scatter, ring, ring_all_gather, Group],
                      library=[mesh_groups, mesh_all_reduce])
    run.record("bytes", sizes)
    run.record("seconds", seconds)
    cells = [rank[size] for rank in ranks for size in sizes]
    run.claim("torch's hierarchy gives its flat all_reduce on the world group, largest relative difference",
              at_most=1e-6, measured=max(cell["flat difference"] for cell in cells))
    run.claim("our hierarchy gives torch's result, largest relative difference", at_most=1e-6,
              measured=max(cell["difference"] for cell in cells))
    run.claim("the mesh's groups are ours: inside each node, then across",
              measured=str([rank["mesh groups"] for rank in ranks]), equals=str([rank["our groups"] for rank in ranks]))


def mesh_groups(nodes: int, per_node: int) -> tuple:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (nodes, per_node), mesh_dim_names=("node", "local"))
    return mesh.get_group("local"), mesh.get_group("node")


def mesh_all_reduce(x, inside, across) -> None:
    import torch.distributed as dist

    mine = x.new_empty(x.numel() // inside.size())
    dist.reduce_scatter_single(mine, x, group=inside)
    dist.all_reduce(mine, group=across)
    dist.all_gather_single(x, mine, group=inside)


def flat_all_reduce(x) -> None:
    import torch.distributed as dist

    dist.all_reduce(x)


def both(net, nodes: int, per_node: int, sizes: list[int], repeats: int, seed: int) -> dict:
    """On one rank: our hierarchy, torch's, and torch's flat all_reduce in turns on the same values."""
    import torch
    import torch.distributed as dist

    node_of = [rank // per_node for rank in range(net.size)]
    groups = mesh_groups(nodes, per_node)
    results: dict = {"our groups": [group.ranks for group in node_groups(net, node_of)],
                     "mesh groups": [dist.get_process_group_ranks(group) for group in groups]}
    for size in sizes:
        values = np.random.default_rng((seed, net.rank)).standard_normal(size // 4).astype(np.float32)
        x, y, z = values.copy(), torch.from_numpy(values.copy()), torch.from_numpy(values.copy())
        calls = {"ours": lambda: hierarchical(net, x, node_of), "library": lambda: mesh_all_reduce(y, *groups),
                 "flat": lambda: flat_all_reduce(z)}
        seconds: dict = {side: [] for side in calls}
        for repeat in range(repeats + 1):
            x[:] = y.numpy()[:] = z.numpy()[:] = values
            for side in list(calls)[::-1 if repeat % 2 else 1]:
                seconds[side].append(timed(net, calls[side]))
        largest = np.abs(z.numpy()).max()
        results[size] = {"seconds": {side: s[1:] for side, s in seconds.items()},
                         "flat difference": float(np.abs(y.numpy() - z.numpy()).max() / largest),
                         "difference": float(np.abs(x - y.numpy()).max() / largest)}
    return results


def draw(result: dict, axes) -> None:
    records = result["records"]
    labels = {"ours": "our hierarchy, shared memory", "library": "torch, hierarchy over a mesh", "flat": "torch, flat"}
    for side, label in labels.items():
        axes.plot(records["bytes"], records["seconds"][side], "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="buffer (bytes)", ylabel="seconds",
             title="One all-reduce in three stages, all ranks on one machine")
    axes.legend()


if __name__ == "__main__":
    main.cli()
