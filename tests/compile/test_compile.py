"""Every kernel compiled for chips that are not there: what is promised of the machine code."""

import os
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton

from rmfast.benchmarks import compile_report, offline
from rmfast.kernels import chips

# wgmma on Hopper, tcgen05 on datacentre Blackwell where Triton's dot becomes it, mma elsewhere
TENSOR_CORES = {
    "sm_80": ("HMMA",),
    "sm_90": ("HGMMA",),
    "sm_100": ("UTCHMMA", "HMMA"),
    "sm_120": ("HMMA",),
    "gfx942": ("v_mfma",),
    "gfx950": ("v_mfma",),
}
# global to register or to shared (cache hints stand before the width), and by the copy engine
WIDE_LOADS = {
    "cuda": r"LDG(STS)?\.(.*\.)?(128|256)(\.|$)|UTMALDG|UBLKCP",
    "hip": r"(global|buffer)_load_(lds_)?dwordx4",
}


OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6)  # tiles are chosen for newer ones


def has(compiled, opcodes):
    return any(name.startswith(opcodes) for name in compiled.opcodes())


def loads_wide(compiled):
    wide = WIDE_LOADS[chips.CHIPS[compiled.chip].backend]
    return any(re.match(wide, name) for name in compiled.opcodes())


@pytest.fixture(scope="module")
def compiled(request):
    """Of each chip a future of the cases among the tests that were chosen."""
    chosen = [item.callspec.params for item in request.session.items if _is_case(item)]
    cases = {}
    for one in chosen:
        cases.setdefault(one["chip"], []).append(one["case"])
    with offline.processes() as pool:
        yield {
            chip: pool.submit(compile_report.compile_cases, names, chip)
            for chip, names in cases.items()
        }


def _is_case(item):
    return getattr(item, "originalname", "") == "test_case" and item.path == Path(__file__)


# all that differ on one chip, of attention three cases on three more; the report has all of all six
TWINS = [f"attention, D {width}, bf16" for width in (64, 128, 256)]  # others have options besides
FEW = [
    "attention, D 128, bf16, window, sinks",
    "attention, D 256, bf16, soft cap, window",
    "attention, D 80, fp16, inference",
]
OTHERS = [case for case in compile_report.CASES if not case.startswith("attention")]
CHIPS_AND_CASES = [("sm_90", case) for case in compile_report.CASES if case not in TWINS]
CHIPS_AND_CASES += [("gfx942", case) for case in OTHERS]
CHIPS_AND_CASES += [(chip, case) for chip in ("gfx942", "sm_80", "sm_100") for case in FEW]


# bytes of a thread. Of 15 tiles timed on an H200 the fastest spills a little: with it two programs
# share a processor, and one multiplies while the other waits for memory
LOCAL = {("sm_90", "trie_backward._dkv_kernel", "D 128"): 40}


@pytest.mark.parametrize(("chip", "case"), CHIPS_AND_CASES)
def test_case(chip, case, compiled):
    kernels = compiled[chip].result()[case]
    assert not isinstance(kernels, str), kernels
    assert kernels, "nothing was launched"
    for one in kernels:
        assert one.chip == chip
        if not OLD:
            what = chip, one.kernel, case.split(", ")[1]
            assert one.local_bytes <= LOCAL.get(what, 0), one.kernel
            assert one.local_bytes > 0 or one.spills == 0, one.kernel
        assert one.shared <= chips.CHIPS[chip].shared, one.kernel
        assert one.programs >= 1, one.kernel
    names = {one.kernel for one in kernels}
    expected = compile_report.CASES[case]
    assert names >= {*expected.wide, *expected.dots}
    assert {one.kernel for one in kernels if loads_wide(one)} >= set(expected.wide)
    wide, narrow = TENSOR_CORES[chip], ("HMMA", *TENSOR_CORES[chip])
    for one in kernels:
        if one.kernel in expected.dots:
            assert has(one, narrow if one.kernel in expected.narrow else wide), one.kernel


def test_the_last_program_sees_what_the_others_wrote():
    """Barrier, release, ticket, barrier, strong loads: the interpreter has no threads to race."""
    case = "head and loss, H 4096, bf16"
    with offline.processes(1) as pool:
        one, _ = pool.submit(compile_report.compile_cases, [case], "sm_90").result()[case]
    ops = [
        line for line in one.text.splitlines() if re.search(r"\bMEMBAR|ATOMG|BAR\.SYNC|LDG", line)
    ]
    (ticket,) = [i for i, line in enumerate(ops) if "ATOMG" in line]
    assert re.search(r"ATOMG.*STRONG\.GPU", ops[ticket])
    before, after = "\n".join(ops[:ticket]), "\n".join(ops[ticket + 1 :])
    assert re.search(r"BAR\.SYNC(.|\n)*MEMBAR\.\w+\.GPU", before)
    assert re.search(r"BAR\.SYNC(.|\n)*LDG\S*STRONG\.GPU", after)


# --- the checks see what they look for


@pytest.fixture
def compile_one(tmp_path, monkeypatch):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: nothing can be compiled in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")

    def one(chip, launch):
        with chips.launching_for(chip), offline.record() as recorded:
            launch()
        (launch,) = recorded
        return offline.compile(launch, chip)

    return one


@pytest.fixture
def wrong():
    import importlib.util

    spec = importlib.util.spec_from_file_location("wrong", Path(__file__).with_name("wrong.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("chip", ["sm_90", "gfx942"])
def test_spills_are_seen(chip, compile_one, wrong):
    elements = 256 if chips.CHIPS[chip].backend == "cuda" else 512  # of a thread: its registers
    rows = elements * chips.CHIPS[chip].warp_size // 128
    x = torch.empty(256, 128)
    got = compile_one(chip, lambda: wrong.spill[(1,)](x, x, ROWS=rows, SIZE=128, num_warps=1))
    assert got.spills > 0 and got.local_bytes > 0


@pytest.mark.parametrize("chip", ["sm_80", "gfx950"])
def test_narrow_loads_are_seen(chip, compile_one, wrong):
    x, y = torch.empty(4096), torch.empty(1024)

    def wide(x, stride):
        return loads_wide(compile_one(chip, lambda: wrong.copy[(1,)](x, y, stride, SIZE=1024)))

    assert wide(x, 1) and not wide(x, 2)
    # AMD's wide loads need no alignment
    assert wide(x[1:], 1) == (chips.CHIPS[chip].backend == "hip")


@pytest.mark.parametrize("chip", chips.CHIPS)
def test_tensor_cores_are_seen(chip, compile_one, wrong):
    a, c = torch.empty(64, 64, dtype=torch.bfloat16), torch.empty(64, 64)

    def uses_them(dot):
        got = compile_one(chip, lambda: wrong.matmul[(1,)](a, a, c, 0.5, SIZE=64, DOT=dot))
        return has(got, TENSOR_CORES[chip])

    assert uses_them(True) and not uses_them(False)


def test_launches_are_specialised_as_triton_does(compile_one, wrong):
    a = torch.empty(64, 64, dtype=torch.float16)
    with offline.record() as recorded:
        wrong.copy[(3, 2)](a, a[0, 1:], 48, 64, num_warps=2)
        wrong.copy[lambda meta: (meta["SIZE"],)](a, a, SIZE=16, stride=1)
        wrong.copy[(1,)](a, a, 2**40 + 1, SIZE=16)
    first, second, third = recorded
    assert (first.grid, second.grid) == ((3, 2), (16,))
    assert first.options == {"num_warps": 2} and second.options == {}
    assert (first.arguments["stride"], first.arguments["SIZE"]) == (48, 64)
    keys = [offline.specialised(one, "sm_90") for one in (first, second, third)]
    assert [key.signature["stride"] for key in keys] == ["i32", "constexpr", "i64"]
    assert {key.signature["x"] for key in keys} == {"*fp16"}
    aligned = [["tt.divisibility", 16]]
    assert [keys[0].attrs[(i,)] for i in range(3)] == [aligned, [], aligned]
    assert keys[1].constants[(2,)] == 1


def test_recording_ends():
    from triton.runtime.jit import JITFunction

    before = JITFunction.run
    with pytest.raises(ZeroDivisionError), offline.record():
        assert JITFunction.run is not before
        raise ZeroDivisionError
    assert JITFunction.run is before


def test_the_driver_is_put_back(compile_one, wrong):
    from triton.runtime import driver

    before = dict(vars(driver))
    x = torch.empty(64)
    compile_one("sm_90", lambda: wrong.copy[(1,)](x, x, 1, SIZE=64))
    assert dict(vars(driver)) == before


@pytest.mark.parametrize(
    ("chip", "warps", "registers", "shared", "programs"),
    [
        ("sm_90", 4, 32, 0, 16),  # 64 warps
        ("sm_90", 4, 168, 0, 3),  # 12 warps of 168 registers: 2 * 65536 / (168 * 32)
        ("sm_90", 8, 128, 100 << 10, 2),  # 16 warps of 128 registers; 2 * (100 + 1) KiB
        ("sm_90", 1, 16, 0, 32),
        ("sm_80", 4, 128, 82 << 10, 1),  # two would take 166 KiB of 164
        ("sm_80", 4, 128, 81 << 10, 2),
        ("sm_120", 4, 32, 0, 12),
        ("gfx942", 4, 128, 0, 4),  # 4 waves on each of 4 SIMDs
        ("gfx942", 4, 129, 0, 3),
        ("gfx942", 1, 64, 0, 32),
        ("gfx942", 2, 32, 0, 16),
        ("gfx942", 4, 64, 33 << 10, 1),
        ("gfx950", 4, 64, 33 << 10, 4),
    ],
)
def test_occupancy(chip, warps, registers, shared, programs):
    assert offline.resident(chip, warps, registers, shared) == programs


def test_report(tmp_path, capsys):
    out = tmp_path / "compile.csv"
    case = next(iter(compile_report.CASES))
    compile_report.main(["--cases", case, "--chips", "sm_90", "gfx950", "--csv", str(out)])
    header, *lines = out.read_text().splitlines()
    assert header.split(",") == compile_report.COLUMNS
    assert any("sm_90" in line for line in lines) and any("gfx950" in line for line in lines)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("| kernel | case | chip |")
    assert len(printed) == 2 + len(lines)
