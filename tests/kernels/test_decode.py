"""Weights are multiplied as they are stored: each form against a naive sum in float64 over the dequantised weight."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from sqft.core.delta import dequantized
from sqft.core.grid import Grid, QuantizedWeight, pack_codes
from sqft.core.sparse import Bitmask, to_bitmask
from sqft.kernels import build, decode

# Elsewhere than on x86-64 with AVX2 there is none; where a compiler is lacking, the tests fail.
if any(said in str(decode.KERNEL.absence()) for said in ("x86-64", "processor has no")):
    pytest.skip(str(decode.KERNEL.absence()), allow_module_level=True)

FORMS = ("bf16", "sparse bf16", "int4", "sparse int4")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pruned(rows: int, columns: int, zeros: float = 0.5) -> torch.Tensor:
    """Return a random weight with zeros, -0.0 among what is kept, and rows that are empty, whole and single."""
    weight = torch.randn(rows, columns, generator=generator())
    weight[torch.rand(rows, columns, generator=generator(1)) < zeros] = 0
    weight[0, :3] = -0.0
    if rows > 4:
        weight[1], weight[4] = 0, 0
        weight[2] = 1.5
        weight[4, columns - 1] = 0.25
    return weight.bfloat16()


def ended(values: torch.Tensor) -> torch.Tensor:
    """Return values with bytes behind them that must not count: as numbers they are NaN."""
    return functional.pad(values.contiguous().view(torch.uint8), (0, decode.SLACK), value=255).view(values.dtype)


def quantized(
    weight: torch.Tensor, group: int, *, symmetric: bool = False, scale: torch.dtype = torch.bfloat16, bits: int = 4
) -> tuple[torch.Tensor, Grid]:
    grid = Grid.fit(weight, bits=bits, group_size=group, symmetric=symmetric, dtype=scale)
    return grid.quantize(weight), grid


def stored(form: str, weight: torch.Tensor, group: int = 32, **grid_of: object) -> tuple[decode.Stored, torch.Tensor]:
    """Return a weight in a form, and the dequantised weight that PyTorch makes of the same."""
    shape = (weight.shape[0], weight.shape[1])
    if form == "bf16":
        return decode.Stored(shape, weight), weight
    if form == "sparse bf16":
        bits = weight.view(torch.int16)
        return sparse(to_bitmask(bits, bits != 0), shape), weight
    codes, grid = quantized(weight.float(), group, **grid_of)  # type: ignore[arg-type]
    packed = QuantizedWeight(pack_codes(codes, grid.bits), grid, torch.bfloat16)
    parts = {"scale": grid.scale_OG.view(torch.uint8), "zero": grid.zero_OG, "scale_dtype": grid.scale_OG.dtype}
    if form == "int4":
        return decode.Stored(shape, packed.packed, **parts), dequantized(packed)  # type: ignore[arg-type]
    made = to_bitmask(codes, codes != grid.zero_codes(), group=group)
    return sparse(made, shape, **parts), dequantized(packed)


def sparse(made: Bitmask, shape: tuple[int, int], **parts: object) -> decode.Stored:
    return decode.Stored(shape, ended(made.values_K), made.mask_OW, made.offsets_O, **parts)  # type: ignore[arg-type]


def check(weight: decode.Stored, dense: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Compare the weight to the bit, and the product with a naive sum in float64 within what float32 sums lose."""
    assert weight.fits
    assert torch.equal(weight.weight().view(torch.int16), dense.view(torch.int16))
    y = weight.product(x, bias)
    assert (y.dtype, y.shape) == (x.dtype, (*x.shape[:-1], dense.shape[0]))
    terms = x.double().unsqueeze(-2) * dense.double()
    exact = terms.sum(-1) + (0 if bias is None else bias.double())
    # Each float32 addition loses 2⁻²⁴ of a partial sum at most, which no sum of magnitudes is below.
    most = (terms.abs().sum(-1) + (0 if bias is None else bias.double().abs())) * dense.shape[1] * 2**-24
    if x.dtype == torch.bfloat16:
        most = most + exact.abs() * 2**-8
    assert bool(((y.double() - exact).abs() <= most).all())


@pytest.mark.parametrize("count", range(1, 12))
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_x(form: str, count: int) -> None:
    weight, dense = stored(form, pruned(7, 128))
    for dtype in (torch.bfloat16, torch.float32):
        check(weight, dense, torch.randn(count, 128, generator=generator(2)).to(dtype))


@pytest.mark.parametrize("columns", [1, 15, 16, 63, 64, 65, 100, 1000])
@pytest.mark.parametrize("form", ["bf16", "sparse bf16"])
def test_columns_that_no_word_or_vector_divides(form: str, columns: int) -> None:
    weight, dense = stored(form, pruned(9, max(columns, 3))[:, :columns].contiguous())
    check(weight, dense, torch.randn(2, columns, generator=generator(2)))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("group", "columns"), [(16, 96), (32, 96), (32, 1056), (64, 192), (64, 2112), (128, 2304)])
@pytest.mark.parametrize("form", ["int4", "sparse int4"])
def test_groups(form: str, group: int, columns: int, symmetric: bool) -> None:
    for zeros in (0.0, 0.5, 0.95):
        weight, dense = stored(form, pruned(5, columns, zeros), group, symmetric=symmetric)
        check(weight, dense, torch.randn(1, columns, generator=generator(2)).bfloat16())


@pytest.mark.parametrize("scale", [torch.float16, torch.float32])
@pytest.mark.parametrize("form", ["int4", "sparse int4"])
def test_scales_of_other_dtypes_and_a_group_of_the_whole_row(form: str, scale: torch.dtype) -> None:
    weight, dense = stored(form, pruned(6, 512), 512, scale=scale)
    check(weight, dense, torch.randn(3, 512, generator=generator(2)))


def test_codes_of_three_bits() -> None:
    weight, dense = stored("int4", pruned(6, 64), 32, bits=3)
    check(weight, dense, torch.randn(1, 64, generator=generator(2)))


def test_every_zero_point_and_scales_of_all_magnitudes() -> None:
    columns, rows = 64, 16 * 40
    codes = torch.randint(16, (rows, columns), dtype=torch.uint8, generator=generator())
    zero = torch.arange(16, dtype=torch.uint8).repeat(40).unsqueeze(1).expand(-1, 2).contiguous()
    scale = (torch.rand(rows, 2, generator=generator(1)) + 0.5) * 10.0 ** torch.arange(-20, 20).repeat_interleave(
        16
    ).unsqueeze(1)
    grid = Grid(scale.bfloat16(), zero, 4, columns, False)
    parts = {"scale": grid.scale_OG.view(torch.uint8), "zero": zero}
    dense = grid.dequantize(codes, torch.bfloat16)
    made = to_bitmask(codes, codes != grid.zero_codes(), group=32)
    for weight in (
        decode.Stored((rows, columns), pack_codes(codes, 4), **parts),
        sparse(made, (rows, columns), **parts),
    ):
        assert torch.equal(weight.weight().view(torch.int16), dense.view(torch.int16))


@pytest.mark.parametrize("form", FORMS)
def test_bias_and_an_x_that_is_not_contiguous(form: str) -> None:
    weight, dense = stored(form, pruned(5, 64))
    x = torch.randn(64, 2, 3, generator=generator(2)).permute(2, 1, 0)
    bias = torch.randn(5, generator=generator(3))
    check(weight, dense, x, bias)
    check(weight, dense, x.bfloat16(), bias.bfloat16())


@pytest.mark.parametrize("form", FORMS)
def test_threads_change_nothing(form: str) -> None:
    weight, dense = stored(form, pruned(1001, 256))
    x = torch.randn(2, 256, generator=generator(2))
    found, before = weight.product(x), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(weight.product(x), found)
        assert torch.equal(weight.weight().view(torch.int16), dense.view(torch.int16))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
def test_every_processor_gives_the_same_weights_and_sums(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = stored(form, pruned(7, 2112), 64)
    made = {}
    for capability in ("AVX512", "AVX2"):
        if not getattr(torch.cpu, f"_is_{capability.lower()}_supported")():
            continue
        monkeypatch.setattr(decode, "KERNEL", build.Kernel(decode._load, "said"))
        monkeypatch.setattr("sqft.kernels.build.processor", lambda capability=capability: capability)
        x = [torch.randn(count, 2112, generator=generator(count)) for count in range(1, 12)]
        made[capability] = torch.cat([weight.product(rows) for rows in x]), weight.weight().view(torch.int16)
    if len(made) < 2:
        pytest.skip(f"only {', '.join(made)} here")
    (wide, wide_weight), (narrow, narrow_weight) = made["AVX512"], made["AVX2"]
    assert torch.equal(wide_weight, narrow_weight)
    if "int4" in form:  # whose sums are added in another order
        torch.testing.assert_close(wide, narrow, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(wide, narrow)


def test_what_is_not_a_number_stays_so() -> None:
    weight, _ = stored("bf16", torch.ones(2, 64).bfloat16())
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    x[0, 0] = float("nan")
    assert weight.product(x).isnan().all()
    x[0, 0] = float("inf")
    assert weight.product(x).isinf().all()


def test_operators_say_their_shapes_without_data() -> None:
    weight, _ = stored("sparse int4", pruned(5, 64))
    arguments = weight._arguments
    torch.library.opcheck(torch.ops.sqft.stored_product, (torch.randn(2, 64), None, *arguments))
    torch.library.opcheck(torch.ops.sqft.stored_weight, arguments)


def test_shapes_that_the_kernel_does_not_take() -> None:
    zero = torch.zeros(1, 4, dtype=torch.uint8)
    assert decode.Stored((1, 128), zero, zero=zero).fits
    assert not decode.Stored((1, 96), zero, zero=zero).fits  # groups of 24
    assert not decode.Stored((1, 16), zero, zero=zero[:, :1]).fits  # half a vector in each half
    assert not decode.Stored((1, 384), zero, mask=zero, zero=zero).fits  # groups of 96 cross what is unpacked at a time
    assert decode.Stored((1, 384), zero, zero=zero).fits


def test_it_takes_few_rows_without_gradient_on_a_cpu() -> None:
    x = torch.zeros(decode.ROWS, 64)
    assert not decode.takes(x)  # gradients are on
    with torch.no_grad():
        assert decode.takes(x)
        assert decode.few(x)
        assert not decode.few(torch.zeros(decode.ROWS + 1, 64))
        assert not decode.takes(x.half())
        assert not decode.takes(x.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not decode.takes(x)
        with decode.stock():
            assert not decode.takes(x)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Look for the kernel anew, in a cache that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(decode, "KERNEL", build.Kernel(decode._load, decode.KERNEL._otherwise))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("compiler", "said"), [("no-such-compiler", "no C++ compiler"), ("false", "false does not build the kernel")]
)
def test_without_a_compiler_one_line_says_so(
    compiler: str, said: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.INFO, "sqft"), torch.no_grad():
        assert not decode.takes(torch.zeros(1, 64))
        assert not decode.takes(torch.zeros(1, 64))
    assert len([line for line in caplog.messages if "are decompressed" in line]) == 1
    assert caplog.text.count("building") == 1
    assert said in str(decode.KERNEL.absence())
    assert not list(fresh.rglob("*.so"))


def test_another_processor_and_a_cache_that_cannot_be_written(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh.parent.joinpath("cache").write_text("a file")
    assert "cannot be written" in str(decode._load())
    monkeypatch.setattr("sqft.kernels.build.processor", lambda: "DEFAULT")
    assert "no AVX2" in str(decode._load())
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "x86-64" in str(decode._load())


def test_opened_on_another_processor_it_says_so_and_runs_nothing() -> None:
    """What runs when a library is opened would end a process whose processor has no such instruction."""
    script = (
        "from sqft.kernels import build, decode\n"
        "library = build.load('decode', 'decoding', *decode._FLAGS, *build.VECTORS['AVX512'])\n"
        "print(library if isinstance(library, str) else library.sqft_supported())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(int(torch.cpu._is_avx512_supported()))
