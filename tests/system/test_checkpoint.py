"""Checkpoints are exact, whole or absent, and never taken on trust; a resumed run is the uninterrupted one."""

import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import zlib
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from crew import Crew
from helpers import FAMILIES, each_family, tiny_model, with_adapters
from torch import nn
from torch.distributed.tensor import DTensor

import train
from bench import faults
from mmsr import assemble, lora
from mmsr.report.output import Output
from mmsr.system import checkpoint
from mmsr.system.errors import UserError
from mmsr.system.parallel import Ranks
from mmsr.update import MasterWeights, Trainer

DTYPES = (torch.float32, torch.bfloat16)
SHARDED = (torch.float32,)  # shards are kept as fp32 masters
FROZEN = "visual.patch_embed.proj.weight"  # gets no gradient in these tests: the optimizer has no state for it


# ---- saved and loaded: every tensor, bit for bit


def adam(model: nn.Module, fused: bool = False, **options) -> MasterWeights:
    """Not fused: that kernel computes the last elements of a tensor in another way, so bits depend on the sharding."""
    return MasterWeights(model, fused=fused, **options)


def walk(model: nn.Module, optimizer: MasterWeights, steps: int, seed: int) -> None:
    """A few optimizer steps on made-up gradients, a function of `seed`. Sharded parameters take their part."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * seed + step)
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator).to(param.dtype)
            if isinstance(param, DTensor):
                noise = torch.distributed.tensor.distribute_tensor(noise, param.device_mesh, param.placements)
            param.grad = None if name == FROZEN else noise
        optimizer.step(1e-3)


def contents(model: nn.Module, optimizer: MasterWeights) -> dict[str, torch.Tensor]:
    tensors = checkpoint._tensors(model, optimizer)
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: tensor.clone() for name, tensor in whole.items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []


@each_family
@pytest.mark.first_is_quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"fused": True}, {"betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.0}], ids=str
)
def test_round_trip_is_exact_and_goes_on_exactly(tmp_path, dtype, options):
    model = tiny_model(1).to(dtype)
    optimizer = adam(model, **options)
    walk(model, optimizer, 3, seed=1)
    checkpoint.save(tmp_path, 3, model, optimizer, {"step": 3, "cursor": 12}, keep=2)
    fresh = tiny_model(2).to(dtype)
    resumed = adam(fresh, **options)
    places = [p.data_ptr() for p in fresh.parameters()]
    assert checkpoint.resume(tmp_path, fresh, resumed) == {"step": 3, "cursor": 12}
    assert [p.data_ptr() for p in fresh.parameters()] == places, "loaded in place"
    saved = contents(model, optimizer)
    assert f"optimizer.step.{FROZEN}" not in saved and sum("exp_avg_sq." in name for name in saved) > 30
    assert ("rest.model.norm.weight" in saved) == (dtype == torch.bfloat16)
    assert_equal(contents(fresh, resumed), saved)
    walk(model, optimizer, 2, seed=2)
    walk(fresh, resumed, 2, seed=2)
    assert_equal(contents(fresh, resumed), contents(model, optimizer))


def test_tensors_are_spread_over_files_of_bounded_size(tmp_path, monkeypatch):
    """A file is put together in memory: all in one would need the whole run there twice over."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100_000)
    model = tiny_model(1)
    optimizer = adam(model)
    walk(model, optimizer, 1, seed=1)
    checkpoint.save(tmp_path, 1, model, optimizer, {}, keep=2)
    sizes = [file.stat().st_size for file in (tmp_path / "step-000001").glob("*.safetensors")]
    largest = max(tensor.nbytes for tensor in contents(model, optimizer).values())  # has a file to itself
    assert len(sizes) > 5 and max(sizes) < largest + 10_000
    fresh = tiny_model(2)
    resumed = adam(fresh)
    checkpoint.resume(tmp_path, fresh, resumed)
    assert_equal(contents(fresh, resumed), contents(model, optimizer))


def test_checkpoint_of_another_model_or_precision_is_refused(tmp_path):
    model = tiny_model(1)
    checkpoint.save(tmp_path, 1, model, adam(model), {}, keep=2)
    for other in (tiny_model(1, hidden_size=32), tiny_model(1).bfloat16(), tiny_model(1, num_hidden_layers=1)):
        with pytest.raises(UserError, match="step-000001: .* is .* there and .* in this run"):
            checkpoint.resume(tmp_path, other, adam(other))


def test_checkpoint_of_adapters_holds_more_than_adapters_or_changes_the_rest(tmp_path):
    model = with_adapters(tiny_model(1).bfloat16(), rank=4)
    optimizer = adam(model)
    walk(model, optimizer, 2, seed=1)
    checkpoint.save(tmp_path, 2, model, optimizer, {"step": 2}, keep=2)
    saved = contents(model, optimizer)
    assert all(lora.is_adapter(name) and saved[name].dtype == torch.float32 for name in saved)
    assert len(saved) == 4 * 2 * len(lora.adapted(model))  # weight, two moments, step
    bytes_of_all = sum(file.stat().st_size for file in (tmp_path / "step-000002").glob("*.safetensors"))
    assert bytes_of_all < 4 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    fresh = with_adapters(tiny_model(2).bfloat16(), rank=4, seed=5)
    frozen = {name: p.clone() for name, p in fresh.named_parameters() if not lora.is_adapter(name)}
    resumed = adam(fresh)
    assert checkpoint.resume(tmp_path, fresh, resumed) == {"step": 2}
    assert_equal(contents(fresh, resumed), saved)
    weights = dict(fresh.named_parameters())
    assert all(torch.equal(weights[name], before) for name, before in frozen.items())


def test_checkpoint_of_another_rank_or_of_a_full_run_is_taken_for_one_of_adapters(tmp_path):
    def saved(model, step):
        checkpoint.save(tmp_path / str(step), step, model, adam(model), {}, keep=2)

    makers = {1: lambda: with_adapters(tiny_model(1), rank=4), 2: lambda: tiny_model(1)}
    makers |= {3: lambda: with_adapters(tiny_model(1), ("q_proj",)), 4: lambda: with_adapters(tiny_model(1), rank=8)}
    for step, make in makers.items():
        saved(make(), step)
    for there in makers:
        for here, make in makers.items():
            if here == there:
                continue
            with pytest.raises(UserError, match="is .* there and .* in this run: resume with equal options") as told:
                model = make()
                checkpoint.resume(tmp_path / str(there), model, adam(model))
            assert "\n" not in str(told.value)


# ---- which are kept, which is taken


class Small(nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two = nn.Linear(4, 3), nn.Linear(2, 2, bias=False)


def saved_runs(root: Path, steps: range, keep: int = 100) -> tuple[Small, MasterWeights]:
    """A small model, saved after each of `steps`."""
    model = Small()
    optimizer = adam(model)
    for step in steps:
        walk(model, optimizer, 1, seed=step)
        checkpoint.save(root, step, model, optimizer, {"step": step}, keep)
    return model, optimizer


def taken(root: Path) -> int:
    model = Small(1)
    return checkpoint.resume(root, model, adam(model))["step"]


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def test_last_k_sound_checkpoints_are_kept(tmp_path, capsys):
    saved_runs(tmp_path, range(1, 5), keep=2)
    assert folders(tmp_path) == ["step-000003", "step-000004"]
    flip(tmp_path / "step-000004" / "state.json", 9)
    assert taken(tmp_path) == 3
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "step-000004 is not used: state.json is not as it was saved" in warning
    saved_runs(tmp_path, range(5, 6), keep=2)
    assert folders(tmp_path) == ["step-000003", "step-000004", "step-000005"], "a damaged one is none to count on"
    saved_runs(tmp_path, range(6, 7), keep=2)
    assert folders(tmp_path) == ["step-000005", "step-000006"]


def test_what_lies_ahead_of_a_new_checkpoint_is_removed(tmp_path):
    """After a fall-back the run goes another way: a later folder, read once more, would jump to the old one."""
    saved_runs(tmp_path, range(1, 5))
    saved_runs(tmp_path, range(3, 4))
    assert folders(tmp_path) == ["step-000001", "step-000002", "step-000003"] and taken(tmp_path) == 3


def test_remains_of_a_save_cut_short_are_never_taken(tmp_path):
    saved_runs(tmp_path, range(1, 3))
    shutil.copytree(tmp_path / "step-000002", tmp_path / "step-000003.tmp")
    assert taken(tmp_path) == 2
    saved_runs(tmp_path, range(4, 5))
    assert folders(tmp_path) == ["step-000001", "step-000002", "step-000004"]


@pytest.mark.parametrize("name", ["step-000001", "step-000002", "step-000009", "step-000003.tmp"])
def test_a_symlinked_checkpoint_makes_every_later_save_fail(tmp_path, name):
    """Somebody's way to another disk: the link goes when the checkpoint is to go, what it leads to stays."""
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    saved_runs(root, range(1, 3))
    source = root / name if (root / name).exists() else root / "step-000002"
    shutil.copytree(source, elsewhere)
    if source == root / name:
        shutil.rmtree(source)
    (root / name).symlink_to(elsewhere)
    before = faults.fingerprint(elsewhere)
    saved_runs(root, range(3, 6), keep=2)
    assert folders(root) == ["step-000004", "step-000005"] and taken(root) == 5
    assert faults.fingerprint(elsewhere) == before


def test_a_link_that_leads_nowhere_or_to_the_newest_is_in_the_way(tmp_path):
    saved_runs(tmp_path, range(1, 3))
    (tmp_path / "step-000001.tmp").symlink_to(tmp_path / "nowhere")
    (tmp_path / "step-000008").symlink_to(tmp_path / "nowhere")
    (tmp_path / "latest").symlink_to(tmp_path / "step-000002")
    saved_runs(tmp_path, range(3, 6), keep=2)
    assert folders(tmp_path) == ["latest", "step-000004", "step-000005"] and taken(tmp_path) == 5


def test_nothing_to_resume_is_told_from_nothing_sound(tmp_path):
    model = Small()
    assert checkpoint.resume(tmp_path / "none", model, adam(model)) is None
    saved_runs(tmp_path, range(1, 3))
    for folder in tmp_path.iterdir():
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="none of its 2 checkpoints is sound"):
        taken(tmp_path)


# ---- damage


def damaged(file: Path, rng: random.Random) -> None:
    """A flipped bit, or the end cut off."""
    if rng.random() < 0.5:
        return flip(file, rng.randrange(8 * file.stat().st_size))
    os.truncate(file, rng.randrange(file.stat().st_size))


def damage_trials(root: Path, trials: int) -> list[int | str]:
    """The step that is taken, or the error, after each of many damages to the newer of two checkpoints."""
    saved_runs(root, range(1, 3))
    newest, pristine = root / "step-000002", root.parent / "pristine"
    shutil.copytree(newest, pristine)
    rng, found = random.Random(0), []
    files = sorted(pristine.iterdir())
    for trial in range(trials):
        file = files[trial % len(files)]
        damaged(newest / file.name, rng)
        try:
            found.append(taken(root))
        except BaseException as error:  # without verification DCP raises its own
            found.append(type(error).__name__)
        shutil.copyfile(file, newest / file.name)
    return found


@pytest.mark.slow
def test_thousand_flips_and_truncations_are_all_detected_and_the_previous_is_taken(tmp_path):
    assert damage_trials(tmp_path / "root", 1000) == [1] * 1000


def test_damage_would_go_unnoticed_without_verification(tmp_path, monkeypatch, record_property):
    """The guard off, to show that it matters: most of it loads as if nothing were wrong."""
    monkeypatch.setattr(checkpoint, "_problem", lambda folder, ranks: None)
    unnoticed = damage_trials(tmp_path / "root", 100).count(2)
    record_property("damages of 100 that load without verification", unnoticed)
    print(f"without verification {unnoticed} of 100 damages load")
    assert unnoticed > 30


@pytest.mark.parametrize("change", ["missing", "added", "other step"])
def test_folder_whose_files_are_not_the_manifests_is_not_sound(tmp_path, change):
    saved_runs(tmp_path, range(1, 3))
    newest = tmp_path / "step-000002"
    if change == "missing":
        next(newest.glob("*.safetensors")).unlink()
    elif change == "added":
        shutil.copyfile(next(newest.glob("*.safetensors")), newest / "shard-00009-model-00001-of-00001.safetensors")
    else:
        newest.rename(tmp_path / "step-000009")
    assert taken(tmp_path) == 1


# ---- pickles


class Bomb:
    def __reduce__(self):
        return os.abort, ()


def test_pickle_in_place_of_a_checkpoint_is_refused(tmp_path):
    """As a file, as a folder in DCP's usual form, and with a forged manifest that fits."""
    saved_runs(tmp_path, range(1, 2))
    (tmp_path / "step-000007").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "step-000008").mkdir()
    for name in (".metadata", "__0_0.distcp", "manifest.json"):
        (tmp_path / "step-000008" / name).write_bytes(pickle.dumps(Bomb()))
    shutil.copytree(tmp_path / "step-000001", tmp_path / "step-000009")
    (tmp_path / "step-000009" / ".metadata").write_bytes(pickle.dumps(Bomb()))
    forge_manifest(tmp_path / "step-000009")
    assert taken(tmp_path) == 1


def test_pickle_in_place_of_a_shard_is_refused(tmp_path):
    saved_runs(tmp_path, range(1, 2))
    next((tmp_path / "step-000001").glob("*.safetensors")).write_bytes(pickle.dumps(Bomb()))
    forge_manifest(tmp_path / "step-000001")
    with pytest.raises(UserError, match="step-000001 was not written by this program"):
        taken(tmp_path)


def forge_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    files = {file.name: checkpoint._entry(file) for file in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(checkpoint._manifest_text(checkpoint._step_of(folder), files))


def test_resume_never_unpickles(tmp_path, monkeypatch):
    saved_runs(tmp_path, range(1, 2))

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert taken(tmp_path) == 1


# ---- a disk that is full


@pytest.mark.parametrize("sync", range(6))
def test_failing_disk_leaves_older_checkpoints_and_one_clear_line(tmp_path, monkeypatch, sync):
    """ENOSPC at each sync in turn: the parent's, DCP's own, the files', the manifest's."""
    model, optimizer = saved_runs(tmp_path, range(1, 3), keep=2)
    before = faults.fingerprint(tmp_path)
    left, real = [sync], os.fsync

    def fsync(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError) as failure:
        checkpoint.save(tmp_path, 3, model, optimizer, {"step": 3}, keep=2)
    assert "step-000003 could not be saved (" in str(failure.value) and "No space left" in str(failure.value)
    assert "\n" not in str(failure.value)
    assert faults.fingerprint(tmp_path) == before and taken(tmp_path) == 2
    monkeypatch.undo()
    checkpoint.save(tmp_path, 3, model, optimizer, {"step": 3}, keep=2)
    assert taken(tmp_path) == 3


def test_full_disk_leaves_older_checkpoints(tmp_path):
    """A real one: a file system of 400 kB, of which a checkpoint takes 150."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        model = nn.Linear(120, 100)
        optimizer = adam(model)
        walk(model, optimizer, 1, seed=1)
        for step in (1, 2):
            checkpoint.save(tmp_path, step, model, optimizer, {"step": step}, keep=2)
        before = faults.fingerprint(tmp_path)
        with pytest.raises(UserError, match="No space left"):
            checkpoint.save(tmp_path, 3, model, optimizer, {"step": 3}, keep=2)
        assert faults.fingerprint(tmp_path) == before
        assert checkpoint.resume(tmp_path, model, optimizer) == {"step": 2}
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_checkpoint_that_does_not_read_back_is_not_published(tmp_path, monkeypatch):
    """A disk that takes the bytes and keeps others."""
    model, optimizer = saved_runs(tmp_path, range(1, 3), keep=2)
    real = checkpoint._synced

    def lossy(file):
        entry = real(file)
        if file.suffix == ".safetensors":
            flip(file, 8 * (file.stat().st_size - 1))
        return entry

    monkeypatch.setattr(checkpoint, "_synced", lossy)
    with pytest.raises(UserError, match="is not as it was saved when read back"):
        checkpoint.save(tmp_path, 3, model, optimizer, {"step": 3}, keep=2)
    assert folders(tmp_path) == ["step-000001", "step-000002"]


# ---- several ranks


def sharded(seed: int, dtype: torch.dtype) -> nn.Module:
    """The tiny model as FSDP2 has it, cut unevenly in places."""
    from torch.distributed.fsdp import fully_shard

    model = tiny_model(seed).to(dtype)
    for layer in [*model.model.layers, *model.visual.blocks]:
        fully_shard(layer)
    return fully_shard(model)


def on_two_ranks(rank: int, root: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=2)
    for dtype in SHARDED:
        take_over(Ranks(rank, 2), root / str(dtype), dtype)
    dist.barrier()  # gloo aborts a rank whose peer has gone
    dist.destroy_process_group()


def take_over(ranks: Ranks, root: Path, dtype: torch.dtype) -> None:
    model = sharded(5, dtype)
    optimizer = adam(model)
    assert checkpoint.resume(root / "one", model, optimizer, ranks) == {"step": 3}  # saved by one process
    walk(model, optimizer, 2, seed=2)
    checkpoint.save(root / "two", 5, model, optimizer, {"step": 5}, 2, ranks)
    checkpoint.save(root / "two", 6, model, optimizer, {"step": 6}, 2, ranks)
    if not ranks.main:
        flip(root / "two" / "step-000006" / "state.json", 9)
    dist.barrier()
    again = sharded(6, dtype)
    resumed = adam(again)
    assert checkpoint.resume(root / "two", again, resumed, ranks) == {"step": 5}
    assert_equal(contents(again, resumed), contents(model, optimizer))
    with pytest.MonkeyPatch.context() as patch:
        if not ranks.main:  # an error on one rank is everybody's
            patch.setattr(checkpoint, "_synced", full)
        with pytest.raises(UserError, match="No space left"):
            checkpoint.save(root / "two", 7, model, optimizer, {"step": 7}, 2, ranks)


def adapters_on_ranks(ranks: Ranks, root: str, across: str) -> str:
    """Saved by one process, taken over by two, and by one again; what is frozen is whole or sharded."""
    from test_parallel import beside

    root = Path(root)
    model = beside(ranks, across)
    optimizer = adam(model)
    assert checkpoint.resume(root / "one", model, optimizer, ranks) == {"step": 3}
    for step in range(2):  # not `walk`, whose gradients are of shards
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(f"{step} {name}".encode()))
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step(1e-3)
    checkpoint.save(root / across, 5, model, optimizer, {"step": 5}, 2, ranks)
    again = beside(ranks, across)
    resumed = adam(again)
    assert checkpoint.resume(root / across, again, resumed, ranks) == {"step": 5}
    assert_equal(contents(again, resumed), contents(model, optimizer))
    digest = hashlib.sha256()
    for _, tensor in sorted(contents(model, optimizer).items()):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.slow
def test_ranks_with_adapters_take_over_other_bits_than_were_saved(tmp_path):
    model = with_adapters(tiny_model(1))
    optimizer = adam(model)
    walk(model, optimizer, 3, seed=1)
    checkpoint.save(tmp_path / "one", 3, model, optimizer, {"step": 3}, keep=2)
    crew = Crew(2)
    try:
        found = [digest for across in ("none", "node") for digest in crew(adapters_on_ranks, str(tmp_path), across)]
    finally:
        crew.stop()
    alone = adapters_on_ranks(Ranks(), str(tmp_path), "none")
    assert found == [alone] * 4


def full(file: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
def test_two_ranks_take_over_from_one_and_one_from_two(tmp_path):
    runs = {}
    for dtype in SHARDED:
        model = tiny_model(1).to(dtype)
        runs[dtype] = model, adam(model)
        walk(*runs[dtype], 3, seed=1)
        checkpoint.save(tmp_path / str(dtype) / "one", 3, *runs[dtype], {"step": 3}, keep=2)
    torch.multiprocessing.spawn(on_two_ranks, (tmp_path,), 2)
    for dtype, run in runs.items():
        root = tmp_path / str(dtype) / "two"
        assert len(list((root / "step-000005").glob("*.safetensors"))) == 2, "each rank has written its part"
        assert folders(root) == ["step-000005", "step-000006"]
        walk(*run, 2, seed=2)
        back = tiny_model(7).to(dtype)
        resumed = adam(back)
        assert checkpoint.resume(root, back, resumed) == {"step": 5}
        assert_equal(contents(back, resumed), contents(*run))


# ---- whole runs


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    """By family: the model that runs start from, and the run that nothing interrupted, all its checkpoints kept."""

    @cache
    def made(family: str) -> tuple[Path, Path]:
        base = faults.miniature_base(tmp_path_factory.mktemp("base"), family)
        return base, uninterrupted(base, tmp_path_factory.mktemp("whole") / "run")

    return made


@pytest.fixture
def base(begin) -> Path:
    return begin("qwen2_5")[0]


@pytest.fixture
def whole(begin) -> Path:
    return begin("qwen2_5")[1]


@pytest.fixture(autouse=True)
def varied_rewards(monkeypatch):
    monkeypatch.setattr(assemble, "score", assemble.score)  # put back afterwards
    faults.vary_rewards()


def uninterrupted(base: Path, out: Path) -> Path:
    honest = assemble.score
    faults.vary_rewards()
    train.main(arguments(base, out))
    assemble.score = honest
    weights = {hashlib.sha256(faults.weights(file)).hexdigest() for file in out.glob("checkpoints/*/*.safetensors")}
    assert len(weights) == faults.STEPS, "every step moves the weights"
    return out


def arguments(base: Path, out: Path, *more: str) -> list[str]:
    return faults.arguments(base, out, "--keep", "9", "--eval-every", "2", *more)


def steps_in(out: Path) -> list[tuple[int, bool]]:
    """(step, whether an evaluation) of each line of metrics."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], "eval" in line) for line in lines]


def newest(out: Path) -> int:
    return max(int(path.name[5:]) for path in (out / "checkpoints").iterdir())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, faults.STEPS))])
def test_resumed_run_equals_the_uninterrupted_one(begin, tmp_path, step, family):
    """Weights, optimizer, metrics, rollouts and evaluations, from before, at and after an evaluation."""
    base, whole = begin(family)
    out = shutil.copytree(whole, tmp_path / "run")
    for later in range(step + 1, faults.STEPS + 1):
        shutil.rmtree(out / "checkpoints" / f"step-{later:06d}")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "cut sh')
    train.main(arguments(base, out, "--resume"))
    assert faults.fingerprint(out) == faults.fingerprint(whole)


def test_damaged_checkpoint_costs_steps_and_changes_nothing(base, whole, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "run")
    for step in (4, 5):
        damaged(next((out / "checkpoints" / f"step-{step:06d}").glob("*.safetensors")), random.Random(step))
    train.main(arguments(base, out, "--resume"))
    printed = capsys.readouterr()
    assert "Resumed after step 3." in printed.out and "step-000004 is not used" in printed.err
    assert faults.fingerprint(out) == faults.fingerprint(whole)


def test_without_checkpoint_resume_starts_afresh_and_says_so(base, whole, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(out / "checkpoints")
    train.main(arguments(base, out, "--resume"))
    assert "starting afresh" in capsys.readouterr().out
    assert faults.fingerprint(out) == faults.fingerprint(whole)


def test_resume_with_other_options_is_refused_by_name(base, whole, tmp_path, capsys):
    before = faults.fingerprint(whole)
    with pytest.raises(SystemExit, match="2"):
        train.main(arguments(base, whole, "--resume", "--lr", "0.5", "--keep", "3", "--kl", "0"))
    error = capsys.readouterr().err
    assert "--lr (was 0.0003, is 0.5), --kl (was 0.001, is 0.0)" in error and "--keep" not in error
    with pytest.raises(SystemExit, match="2"):
        train.main(arguments(base, whole))
    assert "is not empty" in capsys.readouterr().err
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match="2"):
        train.main(arguments(base, tmp_path, "--resume"))
    assert "holds no config.json" in capsys.readouterr().err and folders(tmp_path) == ["thesis.tex"]
    assert faults.fingerprint(whole) == before


def test_way_to_cut_the_work_may_change_where_bits_are_not_promised(base, tmp_path):
    from mmsr.config import parse

    parse(arguments(base, tmp_path, "--no-deterministic")).save(tmp_path)
    parse(arguments(base, tmp_path, "--no-deterministic", "--micro-tokens", "99")).check_resumes(tmp_path)
    parse(arguments(base, tmp_path)).save(tmp_path)
    with pytest.raises(UserError, match="--micro-tokens"):
        parse(arguments(base, tmp_path, "--micro-tokens", "99")).check_resumes(tmp_path)


def raise_at_call(monkeypatch, owner, name: str, call: int, number: int) -> None:
    """Send this process a signal within the `call`-th call of a function."""
    real, calls = getattr(owner, name), [0]

    def signalled(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            signal.raise_signal(number)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, signalled)


@pytest.mark.parametrize(
    "moment, number, done",
    [
        pytest.param((train, "roll_out", 3), signal.SIGTERM, 2, marks=pytest.mark.slow),
        ((Trainer, "step", 3), signal.SIGTERM, 3),
        pytest.param((Output, "step", 3), signal.SIGINT, 3, marks=pytest.mark.slow),
        pytest.param((train, "evaluation", 2), signal.SIGINT, 2, marks=pytest.mark.slow),
        pytest.param((checkpoint, "_publish", 2), signal.SIGTERM, 2, marks=pytest.mark.slow),
        pytest.param((train, "evaluation", 4), signal.SIGTERM, faults.STEPS, marks=pytest.mark.slow),
    ],
    ids=lambda value: f"{value[1]}-{value[2]}" if isinstance(value, tuple) else str(value),
)
def test_signal_saves_the_last_finished_step_and_leaves(base, whole, tmp_path, monkeypatch, moment, number, done):
    """In the middle of rollouts, an update, its files, an evaluation, a save: what is left is whole, and goes on."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        raise_at_call(patch, *moment, number)
        with pytest.raises(SystemExit) as leaving:
            train.main(arguments(base, out, "--save-every", "0" if moment[0] is not checkpoint else "1"))
    assert leaving.value.code == 128 + number
    assert newest(out) == done == max(step for step, evaluation in steps_in(out) if not evaluation)
    assert folders(out / "rollouts") == [f"step-{step:06d}.jsonl" for step in range(1, done + 1)]
    assert not list(out.rglob("*.tmp")) and (out / "model").is_dir()
    train.main(arguments(base, out, "--resume", "--save-every", "1"))
    weights = ("model/model.safetensors", "metrics.jsonl", *(f"rollouts/{name}" for name in folders(out / "rollouts")))
    now, then = faults.fingerprint(out), faults.fingerprint(whole)
    last = next(name for name in then if name.startswith(f"checkpoints/step-{faults.STEPS:06d}/shard"))
    assert {name: now[name] for name in (*weights, last)} == {name: then[name] for name in (*weights, last)}


@pytest.mark.slow
def test_signal_before_the_first_step_leaves_nothing_that_is_in_the_way(base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        raise_at_call(patch, train, "roll_out", 1, signal.SIGTERM)
        with pytest.raises(SystemExit, match="143"):
            train.main(arguments(base, tmp_path / "run"))
    assert steps_in(tmp_path / "run") == [(0, True)]
    train.main(arguments(base, tmp_path / "run", "--resume"))
    assert steps_in(tmp_path / "run")[:2] == [(0, True), (1, False)]


@pytest.mark.slow
@pytest.mark.parametrize("options, kills", [("", 4), ("--lora 4 --merge", 2)])
def test_killed_runs_end_with_the_weights_of_the_uninterrupted_one(base, options, kills):
    """kill -9 at random moments, half of them mid-save; bench/faults.py does it at length."""
    command = [sys.executable, "bench/faults.py", "--kills", str(kills), "--model", str(base), "--options", options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == kills and result["mid_save"] >= 1 and result["equal"] == result["runs"] >= 1
