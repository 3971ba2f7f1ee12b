"""Every kind of file gives the RGB values that it shows, or a BadImage that says why not."""

import base64
import io
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from tlcli.data import decode
from tlcli.data.decode import BadImage, read_image, read_raw, to_rgb

GRADIENT = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


def saved(tmp_path: Path, image: Image.Image, name: str, **options: Any) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


def one_pixel(rgb: np.ndarray) -> list[int]:
    assert rgb.dtype == np.uint8
    assert rgb.ndim == 3
    return rgb[0, 0].tolist()


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.ppm", "a.JPG"])
def test_rgb_is_itself(tmp_path: Path, name: str) -> None:
    options = {"quality": 100, "subsampling": 0} if name == "a.JPG" else {}
    rgb = read_image(saved(tmp_path, Image.fromarray(GRADIENT), name, **options))
    assert rgb.shape == (4, 6, 3)
    assert rgb.flags.writeable
    assert np.abs(rgb.astype(int) - GRADIENT).max() <= (8 if name == "a.JPG" else 0)


def test_webp_and_avif(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 16), (200, 40, 90))
    assert one_pixel(read_image(saved(tmp_path, image, "a.webp", lossless=True))) == [200, 40, 90]
    if features.check("avif"):
        rgb = read_image(saved(tmp_path, image, "a.avif", quality=100))
        assert np.abs(rgb.astype(int) - [200, 40, 90]).max() <= 4


@pytest.mark.parametrize(
    ("mode", "colour", "want"),
    [
        ("1", 1, [255, 255, 255]),
        ("L", 77, [77, 77, 77]),
        ("LA", (100, 0), [255, 255, 255]),
        ("LA", (100, 255), [100, 100, 100]),
        ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
        ("RGBA", (10, 20, 30, 0), [255, 255, 255]),
        ("RGBA", (0, 0, 0, 51), [204, 204, 204]),
        ("I;16", 65535, [255, 255, 255]),
        ("I;16", 257 * 100, [100, 100, 100]),
        ("I;16", 257 * 100 + 100, [100, 100, 100]),
        ("CMYK", (0, 0, 0, 0), [255, 255, 255]),
        ("CMYK", (255, 0, 0, 0), [0, 255, 255]),
        ("I;16B", 65535, [255, 255, 255]),
        ("I", 0, [128, 128, 128]),
        ("I", -(2**31), [0, 0, 0]),
        ("I", 2**31 - 1, [255, 255, 255]),
        ("F", 1.0, [255, 255, 255]),
        ("F", 0.5, [128, 128, 128]),
        ("F", 200.0, [255, 255, 255]),
        ("F", float("nan"), [0, 0, 0]),
        ("F", float("inf"), [255, 255, 255]),
    ],
)
def test_modes(tmp_path: Path, mode: str, colour: Any, want: list[int]) -> None:
    name = "a.tif" if mode in ("CMYK", "I;16B", "I", "F") else "a.png"
    assert one_pixel(read_image(saved(tmp_path, Image.new(mode, (3, 2), colour), name))) == want


@pytest.mark.parametrize(
    ("mode", "colour"), [("La", (0, 0)), ("RGBa", (0, 0, 0, 0)), ("PA", (0, 0)), ("RGBX", (255, 255, 255, 0))]
)
def test_modes_that_only_memory_has(mode: str, colour: Any) -> None:
    assert one_pixel(to_rgb(Image.new(mode, (3, 2), colour))) == [255, 255, 255]


def test_cmyk_jpeg(tmp_path: Path) -> None:
    rgb = read_image(saved(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.jpg", quality=100))
    assert np.abs(rgb.astype(int) - [255, 0, 0]).max() <= 4


def test_deep_pgm(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 1 1 65535\n" + struct.pack(">H", 257 * 200))
    assert one_pixel(read_image(tmp_path / "a.pgm")) == [200, 200, 200]


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])], ids=["an index", "a byte a colour"])
def test_palette(tmp_path: Path, transparency: Any) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert read_image(saved(tmp_path, image, "opaque.png")).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    clear = read_image(saved(tmp_path, image, "clear.png", transparency=transparency))
    assert clear.tolist() == [[[255, 255, 255], [40, 50, 60]]]


def turned(orientation: int) -> Image.Image:
    """GRADIENT stored so that a viewer that applies the orientation shows GRADIENT."""
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = Image.fromarray(GRADIENT)
    return image.transpose(inverse[orientation]) if orientation in inverse else image


@pytest.mark.parametrize("name", ["a.png", "a.tif", "deflated.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"compression": "tiff_adobe_deflate"} if name.startswith("deflated") else {}
    path = saved(tmp_path, turned(orientation), name, exif=exif, **options)
    assert np.array_equal(read_image(path), GRADIENT)


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"])
def test_damaged_exif_leaves_the_pixels(tmp_path: Path, exif: bytes) -> None:
    path = saved(tmp_path, Image.new("RGB", (8, 8), (50, 50, 50)), "a.jpg", exif=exif)
    assert one_pixel(read_image(path)) == [50, 50, 50]


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_first_frame(tmp_path: Path, name: str) -> None:
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    options = {"lossless": True} if name == "a.webp" else {}
    path = saved(tmp_path, red, name, save_all=True, append_images=[blue], **options)
    assert one_pixel(read_image(path)) == [255, 0, 0]


def test_mpo_is_a_jpeg(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ((90, 90, 90), (0, 0, 0))]
    frames[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert one_pixel(read_image(tmp_path / "a.jpg")) == [90, 90, 90]


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def test_large_is_not_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, Image.fromarray(GRADIENT), "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # 24 pixels: Pillow warns, and pytest makes that an error
    assert np.array_equal(read_image(path), GRADIENT)
    with ThreadPoolExecutor(4) as pool:
        assert all(np.array_equal(rgb, GRADIENT) for rgb in pool.map(read_image, [path] * 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 11)
    with pytest.raises(BadImage, match="decompression bomb"):
        read_image(path)


# -- photographs with more pixels than any network looks at


@pytest.fixture
def enough(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(decode, "MIN_REDUCED_SIDE", 16)
    return 16


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Soft shapes, as lenses give them."""
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize(
    ("size", "want"),
    [
        ((40, 31), (40, 31)),
        ((40, 32), (20, 16)),
        ((33, 45), (17, 23)),
        ((100, 63), (50, 32)),
        ((64, 64), (16, 16)),
        ((131, 129), (17, 17)),
        ((2000, 1000), (250, 125)),
        ((4000, 1), (4000, 1)),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_large_jpeg_is_decoded_to_as_much_as_is_enough(
    tmp_path: Path, enough: int, size: tuple[int, int], want: tuple[int, int], mode: str
) -> None:
    rgb = read_image(saved(tmp_path, photograph(*size, mode=mode), "a.jpg", quality=95))
    assert rgb.shape == (want[1], want[0], 3)
    assert min(want) >= min(enough, *size)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_reduced_is_what_shrinking_the_whole_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    path = saved(tmp_path, photograph(256, 192), "a.jpg", quality=95, **options)
    whole = Image.fromarray(read_image(path))
    monkeypatch.setattr(decode, "MIN_REDUCED_SIDE", 48)
    reduced = read_image(path)
    assert reduced.shape == (48, 64, 3)
    wanted = np.asarray(whole.resize((64, 48), Image.Resampling.BOX))
    difference = np.abs(reduced.astype(int) - wanted)
    assert difference.mean() < 1
    assert difference.max() <= 8


def test_a_reduced_photograph_stands_upright(tmp_path: Path, enough: int) -> None:
    image, exif = photograph(64, 32), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    upright = read_image(saved(tmp_path, image.transpose(Image.Transpose.ROTATE_270), "a.jpg", quality=95))
    turned = read_image(saved(tmp_path, image, "b.jpg", quality=95, exif=exif))
    assert turned.shape == upright.shape == (32, 16, 3)
    assert np.abs(turned.astype(int) - upright).mean() < 2


def test_a_large_jpeg_that_ends_early_is_still_bad(tmp_path: Path, enough: int) -> None:
    path = saved(tmp_path, photograph(640, 320), "a.jpg", quality=95)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(BadImage, match="truncated"):
        read_image(path)


# -- HEIF and AVIF


HEIC = zlib.decompress(
    base64.b85decode(
        r"c-muNV30{GsVvAy%}izhg51nBLl8SRGck>Uf$?~5YDppk1Sn>t<P<^K3<a6VB@Af5Br_);Y>0~k0}}%yh{gCCLIZ&}Pz(r|%-|v_"
        r"Kx~njnU@CUfn-I2oK&zfpqh-bWJ3ldK}L`g*NRNAa=wDhl3WI;N=CNKf}#Q-`)OuDaz2nQ1?qKXWCjUM04tLF!0_kqj~@&S{LBeJ"
        r"9TE<VJdFSUgA_1>R4{{(+%6`EM4+Um6C)#<%mRf*)@iTS&3g7galwHG1_qu6kZ?;9P&Jzi<H6#Coj^N;lk;<m@{)5ZfTFw%Y(OOp"
        r"BALYnsZifKK(R)0P9n%*5)ijD2!QDS|Nq|rg#nPh01XR)g3O9ckVa+>4h|s2nOT%y0(1_8WM)AwEKV4Kes5%AW^HK$a-=egQq!Ok"
        r"e90-r$>3N3*-@UGk_d_}cMZn%!ip;-GM<_S|D8O&i6NSQr2)51=4Q9<6!9&IH$v1JR$Y<u{-VE#`+4=ry;(gOUp)d<lP6AjJb(44"
        r"?b90Azq1|PY4gGdXcQYHCVYJvw17Mg21Z69P+);V1mXe!Q4)LQ"
    )
)
"""24 by 16 pixels, red and blue, with the EXIF orientation 6."""


def test_heic(tmp_path: Path) -> None:
    pytest.importorskip("pi_heif")
    (tmp_path / "a.heic").write_bytes(HEIC)
    pixels = read_image(tmp_path / "a.heic")
    assert pixels.shape == (24, 16, 3)
    assert np.abs(pixels[3, 3].astype(int) - [200, 30, 30]).max() <= 6
    assert np.abs(pixels[-3, 3].astype(int) - [30, 30, 200]).max() <= 6


def test_heic_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    with pytest.raises(BadImage, match=r"pip install 'tlcli\[heif\]'"):
        read_image(tmp_path / "a.heic")


def test_text_of_a_png_is_not_its_depth(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("bit_depth", "sixteen")
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "a.png", pnginfo=info)
    assert read_image(tmp_path / "a.png").tolist() == [[[1, 2, 3]] * 4] * 4


def test_unsigned_tiff_of_32_bits_does_not_wrap(tmp_path: Path) -> None:
    values = np.array([[0, 2**31 + 5, 2**32 - 1]], dtype=np.uint32)
    tags = {256: 3, 257: 1, 258: 32, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 12, 339: 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = b"II*\0" + struct.pack("<I", 20) + values.tobytes() + struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(content)
    assert read_raw(tmp_path / "a.tif").values.tolist() == values.tolist()
    assert read_image(tmp_path / "a.tif")[0, :, 0].tolist() == [0, 128, 255]


def test_deep_color_ppm_is_marked_as_reduced(tmp_path: Path) -> None:
    (tmp_path / "deep.ppm").write_bytes(b"P6 2 1 65535\n" + bytes(12))
    (tmp_path / "plain.ppm").write_bytes(b"P6 2 1 255\n" + bytes(6))
    assert [read_raw(tmp_path / name).is_reduced for name in ("deep.ppm", "plain.ppm")] == [True, False]
