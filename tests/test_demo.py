"""What the demo page does, without the page: canvases are exact, what is offered works, what is limited is refused."""

import itertools
import os
import socket
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import Future
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from pipelines.code_pictures import LARGEST_CELL, NO_CODE, code_picture, wrapped
from pipelines.demo import actions, canvas
from pipelines.demo.actions import ANY_CLASS, NO_CLASS, PAINTED, Choices, Limits
from pipelines.demo.server import check_port, is_loopback
from pipelines.masks import code_masks
from tests import tiny
from tests.test_pipeline import NAMES, PREPROCESSING, make, make_tokenizer, seed
from tests.test_text import make as make_captioned

ROOT = Path(__file__).resolve().parents[1]
CAPTION = "a three left of a seven"
LIMITS = Limits(max_images=5, max_candidates=3)
SHAPES = [(1, 8, 8), (3, 8, 8), (3, 9, 13), (1, 40, 64), (3, 400, 20)]
# Every kind of pipeline there is: maps and vectors, integers and real numbers, of every kind of prior
PIPELINES = {
    "gpt": lambda: make("vqvae", "gpt"),
    "gpt-classes": lambda: make("vqvae", "gpt", 3),
    "two-levels": lambda: make("vqvae2", "pixelcnn", 3),
    "residual": lambda: make("vqvae", "gpt", quantizer={"type": "residual", **tiny.QUANTIZERS["residual"]}),
    "captions": make_captioned,
    "captions-always": lambda: make_captioned(class_dropout=0.0),
    "stage-one-only": lambda: make("vqvae", None),
    "factorial": lambda: make("vqvae", "factorial"),
    "bits-in-place": lambda: make("vqvae", "rbm"),
    "bernoulli": lambda: make("vqvae", "bernoulli"),
    "boltzmann": lambda: make("dvaepp", None),
    "boltzmann-local": lambda: make("dvaepp", None, network={"type": "conv", **tiny.LATENT_NETWORKS["conv"]}),
    "categorical": lambda: make("gumbel_softmax", None),
    "gaussian": lambda: make("gaussian_vae", None),
    "gaussian-classes": lambda: make("cvae", None),
}


def flat(shape, preprocessing=None):
    options = {"preprocessing": preprocessing or {}, "image_shape": shape}
    return make_tokenizer("vqvae", likelihood={"type": "normal"}, **options)


def of_bytes(*shape):
    """Images as 8-bit pictures hold them."""
    return torch.randint(256, shape, generator=seed(1)).float() / 255


def condition(pipeline):
    return CAPTION if pipeline.prior.conditional_on_text else None


def frames(pipeline, num_images=2, choices=None, **options):
    options = {"limits": LIMITS, "stop": Event(), "seconds_per_frame": 0.0, **options}
    return actions.sample(pipeline, num_images, choices or Choices(condition(pipeline)), **options)


@pytest.mark.parametrize("port", [0, -1, 65536, 99999])
def test_what_is_no_port_is_refused(port):
    with pytest.raises(ValueError, match=rf"port must lie in \[1, 65535\], got {port}"):
        check_port("127.0.0.1", port)


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} of 127.0.0.1 cannot be .*\(.+\); give another --port"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", None)
    with pytest.raises(ValueError, match=r"of nowhere.invalid cannot be"):
        check_port("nowhere.invalid", 7860)


@pytest.mark.parametrize("host", ["nowhere.invalid", "192.0.2.1", ""])
def test_a_host_that_is_not_this_machine_is_refused_without_a_port_too(host):
    with pytest.raises(ValueError, match=rf"host '{host}' cannot be listened at \(.+\); give an address of this"):
        check_port(host, None)


# Uploads
# ------------------------------------------------------------------------------------------------


def upload(path, **limits):
    return canvas.open_upload(str(path), **{"max_bytes": 100_000, "max_pixels": 10_000, **limits})


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_pictures_of_common_formats_are_taken_whatever_their_name(tmp_path, format_):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "picture", format=format_)
    assert upload(tmp_path / "picture").size == (20, 10)


@pytest.mark.parametrize(
    "content", [b"hello", b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"]
)
def test_what_is_no_picture_is_named_and_refused(tmp_path, content):
    (tmp_path / "notes.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"^notes.png is not an image that can be read; take PNG, JPEG"):
        upload(tmp_path / "notes.png")


def test_a_damaged_picture_is_refused(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(256, size=(60, 60), dtype=np.uint8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"^a.png is damaged"):
        upload(tmp_path / "a.png")


@pytest.mark.parametrize("step", [(Image, "open"), (canvas, "upright")])
def test_only_what_is_wrong_with_a_picture_is_said_to_be(tmp_path, monkeypatch, step):
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    raised = OverflowError("odd header")
    monkeypatch.setattr(*step, lambda *_, **__: (_ for _ in ()).throw(raised))
    with pytest.raises(ValueError, match=r"^a.png is ") as error:
        upload(tmp_path / "a.png")
    assert error.value.__cause__ is raised
    raised = MemoryError()
    with pytest.raises(MemoryError):
        upload(tmp_path / "a.png")


def png_of_announced_size(path, side):
    """A PNG that announces side x side pixels, of which it holds none."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(b"")
    chunks += struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


@pytest.mark.parametrize("side", [101, 60_000])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, side):
    png_of_announced_size(tmp_path / "bomb.png", side)
    with pytest.raises(ValueError, match=r"^bomb.png has .* pixels.*; the limit is 10,000"):
        upload(tmp_path / "bomb.png")


def test_a_picture_of_just_as_many_pixels_and_bytes_as_allowed_is_taken(tmp_path):
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    size = (tmp_path / "a.png").stat().st_size
    assert upload(tmp_path / "a.png", max_bytes=size).size == (100, 100)
    with pytest.raises(ValueError, match=rf"^a.png has {size} bytes; the limit is {size - 1}"):
        upload(tmp_path / "a.png", max_bytes=size - 1)


def test_a_picture_is_seen_as_in_training():
    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(31, 17, 3), dtype=np.uint8))
    pipeline = make("vqvae", None)
    assert canvas.as_seen(picture, pipeline.tokenizer).equal(pipeline.prepare(picture)[0])
    binary = make_tokenizer(preprocessing={**PREPROCESSING, "binarize": "threshold"})
    assert set(canvas.as_seen(picture, binary).unique().tolist()) == {0, 1}


def test_a_line_that_would_be_enlarged_beyond_measure_is_refused(tmp_path):
    Image.new("L", (200_000, 1)).save(tmp_path / "line.png")
    picture = upload(tmp_path / "line.png", max_pixels=1_000_000)
    with pytest.raises(ValueError, match="its 200000 x 1 would be enlarged to 6400000 x 32"):
        canvas.as_seen(picture, flat((3, 32, 32)))


def test_a_tokenizer_that_does_not_say_how_it_was_trained_sees_pictures_too():
    assert canvas.as_seen(Image.new("RGB", (20, 30), "red"), flat((1, 8, 8))).shape == (1, 8, 8)


# Canvases
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_not_drawn_on_comes_back_exactly(shape):
    tokenizer, image = flat(shape), of_bytes(*shape)
    picture = canvas.on_canvas(image, tokenizer)
    assert picture.size == canvas.canvas_size(tokenizer)
    assert canvas.from_canvas(picture, [], tokenizer).equal(image)
    empty = Image.new("RGBA", picture.size)
    assert canvas.from_canvas(picture.convert("RGBA"), [empty, empty], tokenizer).equal(image)


def test_canvases_are_of_a_size_to_draw_on():
    assert canvas.canvas_size(flat((1, 28, 28))) == (336, 336)
    assert canvas.canvas_size(flat((3, 32, 64))) == (320, 160)
    assert canvas.canvas_size(flat((3, 512, 500))) == (500, 512)


def test_strokes_cover_what_is_below_by_their_share_of_a_pixel():
    tokenizer = flat((3, 8, 8))
    layer = Image.new("RGBA", canvas.canvas_size(tokenizer))
    factor = layer.width // 8
    draw = ImageDraw.Draw(layer)
    draw.rectangle((2 * factor, factor, 3 * factor - 1, 2 * factor - 1), fill="white")  # the whole of pixel (1, 2)
    draw.rectangle((5 * factor, 0, 5 * factor + factor // 2 - 1, factor - 1), fill="white")  # half of pixel (0, 5)
    drawn = canvas.from_canvas(None, [layer], tokenizer)
    expected = torch.zeros(3, 8, 8)
    expected[:, 1, 2], expected[:, 0, 5] = 1.0, 0.5
    assert torch.allclose(drawn, expected, atol=0.51 / 255)
    assert canvas.painted_mask([layer], tokenizer).nonzero().tolist() == [[0, 5], [1, 2]]


def test_a_pixel_that_a_stroke_only_touches_is_painted():
    tokenizer = flat((1, 28, 28))
    layers = [Image.new("RGBA", canvas.canvas_size(tokenizer)) for _ in range(2)]
    layers[0].putpixel((12 * 3, 12 * 5 + 11), (255, 0, 0, 255))
    layers[1].putpixel((335, 335), (255, 0, 0, 255))
    layers[1].putpixel((100, 100), (255, 0, 0, 20))  # the faint edge of a brush
    assert canvas.painted_mask(layers, tokenizer).nonzero().tolist() == [[5, 3], [27, 27]]


@pytest.mark.parametrize("strokes", [[], [Image.new("RGBA", (336, 336))]])
def test_a_mask_needs_something_painted(strokes):
    with pytest.raises(ValueError, match="nothing is painted"):
        canvas.painted_mask(strokes, flat((1, 28, 28)))


def test_layers_of_another_size_are_fitted():
    tokenizer = flat((1, 8, 8))
    layer = Image.new("RGBA", (8, 8))
    layer.putpixel((3, 1), (255, 255, 255, 255))
    assert canvas.painted_mask([layer], tokenizer).nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize(("shape", "count"), [((1, 8, 8), 1), ((3, 28, 28), 5), ((1, 20, 90), 7), ((3, 128, 100), 4)])
def test_what_lies_under_a_click_is_the_image_that_is_seen_there(shape, count):
    greys = torch.linspace(0.1, 0.4, count)
    images = greys.view(-1, 1, 1, 1).expand(count, *shape)
    sheet = canvas.sheet(images)
    pixels = np.asarray(sheet.picture.convert("L")) / 255
    found = set()
    for y, x in itertools.product(range(0, sheet.picture.height, 5), range(0, sheet.picture.width, 5)):
        index = sheet.index_at(x, y, images)
        found.add(index)
        seen = 0.5 if index is None else greys[index].item()
        assert pixels[y, x] == pytest.approx(seen, abs=1.1 / 255)  # whole grey levels, rounded down
    assert found >= set(range(count))
    assert None in found or count == 1


# Pictures of codes
# ------------------------------------------------------------------------------------------------


def cell_colours(picture, rows, columns):
    """The colour beside the upper left corner of each cell, inside of frames."""
    cell = picture.width // columns
    inset = 2 * max(1, cell // 24) + 1
    return [[picture.getpixel((x * cell + inset, y * cell + inset)) for x in range(columns)] for y in range(rows)]


def test_equal_codes_have_equal_colours_and_different_ones_different_colours():
    code = torch.arange(512).view(16, 32)
    colours = [colour for row in cell_colours(code_picture(code, 512), 16, 32) for colour in row]
    assert len(set(colours)) == 512
    again = cell_colours(code_picture(torch.tensor([[7, 300], [300, 7]]), 512), 2, 2)
    assert again == [[colours[7], colours[300]], [colours[300], colours[7]]]


@pytest.mark.parametrize("length", [1, 2, 5, 12, 200])
def test_vectors_are_wrapped_without_loss(length):
    code = torch.arange(length) + 1
    grid, there = wrapped(code)
    assert grid[there].equal(code)
    assert there.sum() == length
    assert abs(grid.shape[0] - grid.shape[1]) <= 1


def test_where_a_wrapped_vector_has_no_code_there_is_none_to_see():
    assert cell_colours(code_picture(torch.zeros(3, dtype=torch.int64), 2), 2, 2)[1][1] == NO_CODE


def test_real_numbers_are_blue_below_zero_and_red_above():
    row = cell_colours(code_picture(torch.tensor([[-3.0, -1.0, 0.0, 1.0, 3.0]]), None), 1, 5)[0]
    red_over_blue = [colour[0] - colour[2] for colour in row]
    assert red_over_blue == sorted(red_over_blue)
    assert row[2] == (255, 255, 255)
    assert row[0][2] > row[0][0] + 100
    assert code_picture(torch.zeros(1, 4), None).getpixel((2, 2)) == (255, 255, 255)


def test_indices_are_written_where_there_is_room():
    few, many = code_picture(torch.full((4, 4), 345), 512), code_picture(torch.full((64, 64), 345), 512)
    assert len(few.getcolors()) > 1
    assert len(many.getcolors()) == 1
    assert code_picture(torch.zeros(1, 1, dtype=torch.int64), 2).size == (LARGEST_CELL, LARGEST_CELL)


def test_marked_codes_have_a_frame_and_others_none():
    code, marked = torch.tensor([[1, 1, 1]]), torch.tensor([[False, True, False]])
    picture = code_picture(code, 5, marked)
    cell = picture.width // 3
    corners = [picture.getpixel((x * cell, 0)) for x in range(3)]
    assert corners[1] == (255, 255, 255)
    assert corners[0] == corners[2] == cell_colours(picture, 1, 3)[0][0] != corners[1]


# What is offered works, and what is not is refused
# ------------------------------------------------------------------------------------------------

TRIED = {
    "temperature": {"temperature": 0.9},
    "cold": {"temperature": 0.0},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.1},
    "guidance_scale": {"guidance_scale": 2.0},
    "guidance_schedule": {"guidance_scale": 2.0, "guidance_schedule": "linear"},
    "local": {"resample": "local"},
}


@pytest.mark.parametrize("kind", PIPELINES)
def test_exactly_what_a_pipeline_refuses_is_disabled(kind):
    pipeline = PIPELINES[kind]()
    prompts = {"prompts": CAPTION} if pipeline.prior.conditional_on_text else {}
    found = set()
    for name, options in TRIED.items():
        try:
            pipeline.sample(2, **prompts, **options)
        except ValueError:
            found.add(name)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:4] = True
    for name, ranking in {"complete": "log_prob", "importance": "importance"}.items():
        try:
            pipeline.complete(torch.rand(1, 3, 8, 8), mask, ranking=ranking, **prompts)
        except ValueError:
            found.add(name)
    try:
        pipeline.sample(prompts="") if prompts else pipeline.sample(guidance_scale=0.0)
    except ValueError:
        found.add("unconditional")
    why = actions.refusals(pipeline)
    if "complete" in why:  # then nobody asks for weights
        found -= {"importance"}
        why.pop("importance", None)
    assert found == why.keys() - {"watch", "region"}
    assert ("watch" in why) == (len(list(frames(pipeline))) == 1)
    assert all(why.values())


@pytest.mark.parametrize("kind", PIPELINES)
def test_everything_on_the_page_works_with_every_kind_of_pipeline(kind):
    pipeline = PIPELINES[kind]()
    spec = pipeline.tokenizer.spec
    *_, last = frames(pipeline, 3)
    assert last.images.shape == (3, 3, 8, 8)
    assert last.arrived == last.length == spec.length
    result = actions.reconstruct(pipeline, last.images[0])
    assert result.reconstruction.shape == (3, 8, 8)
    assert all(code_picture(code[0], size).mode == "RGB" for code, size in zip(result.codes, spec.vocab_sizes))
    other = pipeline.encode(last.images[1:2])
    for region in actions.regions(pipeline):
        painted = torch.eye(8, dtype=torch.bool)
        taken = actions.taken_codes(pipeline, range(spec.num_levels), region, painted)
        assert actions.decode(pipeline, actions.exchange(result.codes, other, taken)).shape == (3, 8, 8)
    for name in actions.classes(pipeline):
        assert next(frames(pipeline, 2, Choices(name), watch=False)).images.shape == (2, 3, 8, 8)
    assert type(pipeline.prior).__name__ in actions.description(pipeline)


def test_a_description_says_what_a_pipeline_is_made_of():
    assert actions.description(make("vqvae2", "pixelcnn", 3)) == (
        "VQVAE2 of colour images of 8 x 8 pixels, codes 2 x 2 of 3 + 4 x 4 of 5; prior PixelCNN, given 3 classes"
    )
    assert "4 real numbers; prior GaussianMixture, as assumed in training" in actions.description(
        PIPELINES["gaussian"]()
    )
    assert actions.description(PIPELINES["boltzmann"]()).endswith("codes 6 of 2; prior RBM, learned with the tokenizer")
    assert actions.description(PIPELINES["captions"]()).endswith("prior GPT, given captions")


def test_classes_are_named_where_they_have_names():
    pipeline = make("vqvae", "gpt", 3)
    assert actions.classes(pipeline) == [ANY_CLASS, NO_CLASS, *NAMES]
    pipeline.class_names = NAMES[:1]
    assert actions.classes(pipeline) == [ANY_CLASS, NO_CLASS, NAMES[0], "1", "2"]
    assert Choices("2").options(pipeline)["class_labels"] == 2
    pipeline.class_names = []
    assert actions.classes(pipeline) == [ANY_CLASS, NO_CLASS, "0", "1", "2"]
    assert actions.classes(PIPELINES["gaussian-classes"]())[:2] == [ANY_CLASS, "0"]  # there is no doing without one
    assert actions.classes(make("vqvae", "gpt")) == []


# Drawing
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "arguments"),
    [
        (Choices(seed=3), {}),
        (Choices("owl", 0.8, 3, 0.9, 0.01, 2.0, "linear", 3),
         {"class_labels": "owl", "temperature": 0.8, "top_k": 3, "top_p": 0.9, "min_p": 0.01, "guidance_scale": 2.0,
          "guidance_schedule": "linear"}),
        (Choices(ANY_CLASS, seed=3), {}),
        (Choices(NO_CLASS, guidance_scale=5.0, guidance_schedule="linear", seed=3), {"guidance_scale": 0.0}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("watch", [False, True])
def test_images_are_those_of_the_pipeline(choices, arguments, watch):
    pipeline = make("vqvae", "gpt", 3)
    *_, last = frames(pipeline, 4, choices, watch=watch)
    assert last.images.equal(pipeline.sample(4, generator=seed(3), output_type="pt", **arguments))


def test_a_class_may_be_given_by_number_where_it_has_no_name():
    pipeline = make("vqvae", "gpt", 3)
    named = next(frames(pipeline, 4, Choices("owl"), watch=False)).images
    pipeline.class_names = []
    assert next(frames(pipeline, 4, Choices("2"), watch=False)).images.equal(named)


def test_a_caption_is_what_is_drawn_after():
    pipeline = make_captioned()
    drawn = next(frames(pipeline, 2, Choices(CAPTION), watch=False)).images
    assert drawn.equal(pipeline.sample(2, prompts=CAPTION, generator=seed(), output_type="pt"))
    with pytest.raises(ValueError, match="give a prompt"):
        next(frames(make_captioned(class_dropout=0.0), 2, Choices(""), watch=False))


def in_step(pipeline):
    """Frames whose drawing draws on when it has been seen how far it is."""
    seen, draw = threading.Semaphore(0), pipeline.sample

    def sample(*arguments, codes_callback, **options):
        def wait(*state):
            codes_callback(*state)
            assert seen.acquire(timeout=60)

        return draw(*arguments, codes_callback=wait, **options)

    def run(**options):
        for frame in frames(pipeline, **options):
            yield frame
            if frame.arrived:  # of what was there before the first code no one waits to be seen
                seen.release()

    pipeline.sample = sample
    return run


def test_codes_are_watched_as_they_arrive():
    seen = list(in_step(make("vqvae2", "pixelcnn"))())
    assert [frame.arrived for frame in seen if frame.arrived] == [*range(1, 21), 20]
    assert all(frame.length == 20 for frame in seen)
    assert all(frame.images.shape == (2, 3, 8, 8) for frame in seen)
    early = next(frame for frame in seen if 0 < frame.arrived < 4)
    assert early.images[:, :, -1, -1].eq(0.5).all()  # nothing there yet


class DrawnAtOnce:
    """In the place of a `ThreadPoolExecutor`: what is asked for is done when it is asked for."""

    def __init__(self, num_threads):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def submit(self, function, *arguments, **options):
        future = Future()
        future.set_result(function(*arguments, **options))
        return future


def test_frames_keep_the_pace_and_those_that_are_late_are_left_out(monkeypatch):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(actions, "time", clock)
    monkeypatch.setattr(actions, "ThreadPoolExecutor", DrawnAtOnce)
    pipeline = make("vqvae2", "pixelcnn")
    assert [frame.arrived for frame in frames(pipeline, seconds_per_frame=0.125)] == [*range(21), 20]
    assert clock.now == 20 * 0.125
    late = []
    for frame in frames(pipeline, seconds_per_frame=0.02):
        clock.sleep(0.1)
        late.append(frame.arrived)
    assert len(late) < 12
    assert late == sorted(late)


def test_drawing_stops_when_it_is_told_to():
    stop, seen = Event(), []
    for frame in in_step(make("vqvae2", "pixelcnn"))(stop=stop):
        seen.append(frame.arrived)
        if frame.arrived == 3:
            stop.set()
    assert seen[-1] == 3


def test_a_page_that_is_gone_stops_its_drawing():
    pipeline, stop, told, num_threads = make("vqvae2", "pixelcnn"), Event(), [], threading.active_count()
    draw = pipeline.sample

    def sample(*arguments, codes_callback, **options):
        def wait(*state):
            told.append(threading.current_thread())
            codes_callback(*state)
            assert stop.wait(timeout=60)

        return draw(*arguments, codes_callback=wait, **options)

    pipeline.sample = sample
    running = frames(pipeline, stop=stop)
    next(running)
    assert told[0].is_alive()
    running.close()
    assert len(told) == 2  # the second time it finds that it has to stop
    assert not told[0].is_alive()
    assert threading.active_count() == num_threads


@pytest.mark.parametrize("watch", [False, True])
def test_what_the_pipeline_refuses_is_refused_with_its_words(watch):
    with pytest.raises(ValueError, match="top_p must lie in"):
        list(frames(make("vqvae", "gpt"), 2, Choices(top_p=1.5), watch=watch))


@pytest.mark.parametrize("count", [0, 6, 2.5, -1, float("inf"), float("nan"), "many", None])
def test_the_number_of_images_is_limited(count):
    with pytest.raises(ValueError, match=f"the number of images must be an integer from 1 to 5, got {count}"):
        next(frames(make("vqvae", "gpt"), count))


def test_numbers_may_come_as_floats_as_pages_send_them():
    assert len(next(frames(make("vqvae", "gpt"), 2.0, Choices(top_k=2.0, seed=1.0), watch=False)).images) == 2


@pytest.mark.parametrize("number", [-1, 0.5, float("inf"), float("nan"), None, 2**63])
def test_a_seed_that_is_none_is_refused(number):
    with pytest.raises(ValueError, match=f"seed must be an integer of at least 0, got {number}"):
        Choices(seed=number).options(make("vqvae", "gpt"))


@pytest.mark.parametrize("name", ["max_images", "max_candidates", "max_upload_bytes", "max_pixels"])
def test_a_limit_below_one_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Limits(**{name: 0})


# Reconstruction, completion, exchange
# ------------------------------------------------------------------------------------------------


def test_a_reconstruction_is_the_pipelines_with_its_psnr():
    pipeline, image = make("vqvae", None), of_bytes(3, 8, 8)
    result = actions.reconstruct(pipeline, image)
    expected = pipeline.reconstruct(image[None], output_type="pt")[0]
    assert result.reconstruction.equal(expected)
    error = np.mean((expected.double().numpy() - image.double().numpy()) ** 2)
    assert result.psnr == pytest.approx(-10 * np.log10(error), abs=1e-4)


def test_a_decoder_that_draws_gives_the_same_reconstruction_each_time():
    pipeline, image = PIPELINES["boltzmann-local"](), of_bytes(3, 8, 8)
    assert actions.reconstruct(pipeline, image, 3).psnr == actions.reconstruct(pipeline, image, 3).psnr


def test_completion_is_the_pipelines():
    pipeline, image = make("vqvae", "gpt", 3), of_bytes(3, 8, 8)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[4:] = True
    choices, options = Choices("dog", top_k=3, seed=5), {"ranking": "importance", "keep_known_pixels": True}
    result = actions.complete(pipeline, image, mask, 3, choices, limits=LIMITS, **options)
    expected = pipeline.complete(image[None], mask, class_labels="dog", top_k=3, num_candidates=3, generator=seed(5),
                                 output_type="pt", **options)  # fmt: skip
    assert result.images.equal(expected.images)
    assert result.images[:, :, :4].equal(image[:, :4].expand(3, -1, -1, -1))
    with pytest.raises(ValueError, match="the number of candidates must be an integer from 1 to 3, got 4"):
        actions.complete(pipeline, image, mask, 4, choices, limits=LIMITS)


@pytest.mark.parametrize("kind", PIPELINES)
def test_all_codes_of_the_other_image_make_the_other_image(kind):
    pipeline = PIPELINES[kind]()
    one, two = (pipeline.encode(of_bytes(2, 3, 8, 8)[i : i + 1]) for i in range(2))
    levels = range(pipeline.tokenizer.spec.num_levels)
    everything = actions.exchange(one, two, actions.taken_codes(pipeline, levels, "all"))
    assert all(a.equal(b) for a, b in zip(everything, two))


@pytest.mark.parametrize("kind", PIPELINES)
def test_halves_are_disjoint_and_make_up_the_whole(kind):
    pipeline = PIPELINES[kind]()
    levels = range(pipeline.tokenizer.spec.num_levels)
    halves = [name for name in actions.regions(pipeline) if name.endswith("half")]
    assert len(halves) in (2, 4)
    for first, second in zip(halves[::2], halves[1::2]):
        pairs = zip(*(actions.taken_codes(pipeline, levels, name) for name in (first, second)))
        for (a, b), length in zip(pairs, pipeline.tokenizer.spec.lengths):
            assert (a ^ b).all()
            assert a.sum() >= b.sum() > 0 or length == 1


def test_a_half_is_where_its_name_says():
    pipeline = make("vqvae", None)
    expected = {"top half": [[1, 1], [0, 0]], "bottom half": [[0, 0], [1, 1]], "left half": [[1, 0], [1, 0]],
                "right half": [[0, 1], [0, 1]]}  # fmt: skip
    for name, codes in expected.items():
        assert actions.taken_codes(pipeline, [0], name)[0][0].int().tolist() == codes


def test_only_codes_of_the_levels_chosen_are_taken():
    pipeline = make("vqvae2", None)
    one, two = (pipeline.encode(of_bytes(2, 3, 8, 8)[i : i + 1]) for i in range(2))
    mixed = actions.exchange(one, two, actions.taken_codes(pipeline, [1], "all"))
    assert mixed[0].equal(one[0])
    assert mixed[1].equal(two[1])


def test_a_painted_region_is_rounded_outwards_as_for_completion():
    pipeline, painted = make("vqvae2", None), torch.zeros(8, 8, dtype=torch.bool)
    painted[5, 1] = True
    taken = actions.taken_codes(pipeline, [0, 1], PAINTED, painted)
    expected = code_masks(painted[None, None], pipeline.tokenizer)[0]
    assert all(a.equal(b) for a, b in zip(taken, expected))
    assert taken[0].int().tolist() == [[[0, 0], [1, 0]]]


def test_levels_and_regions_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match=r"choose at least one of the levels 0 to 1, got \[\]"):
        actions.taken_codes(make("vqvae2", None), [], "all")
    with pytest.raises(ValueError, match=r"choose at least one of the levels 0 to 0, got \[1\]"):
        actions.taken_codes(make("vqvae", None), [1], "all")
    with pytest.raises(ValueError, match="unknown region 'left half'; choose from all, first half, second half"):
        actions.taken_codes(PIPELINES["boltzmann"](), [0], "left half")


# The server, as far as it goes without Gradio
# ------------------------------------------------------------------------------------------------


def test_loopback_is_told_from_other_addresses():
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.0.0.9", "::1", "[::1]"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.168.0.1", "example.org", "", "localhost.example.org"]))


def python(*arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_connections_to_other_machines_are_refused_and_local_ones_are_not():
    done = python("-c", """
import socket
from pipelines.demo.server import refuse_outgoing_connections
server = socket.create_server(("127.0.0.1", 0))
refuse_outgoing_connections()
socket.create_connection(server.getsockname()).close()
socket.getaddrinfo("localhost", 80)
socket.socketpair()
for attempt in (lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
                lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 53)),
                lambda: socket.getaddrinfo("example.org", 80)):
    try:
        attempt()
        print("connected")
    except PermissionError as error:
        print(error)
""")  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 3
    assert all("connects to no other machine" in line for line in said)
    assert "192.0.2.1" in said[0]
    assert "example.org" in said[2]


@pytest.fixture(scope="module")
def without_gradio(tmp_path_factory):
    """The environment of a process to which an installed Gradio is hidden."""
    folder = tmp_path_factory.mktemp("hidden")
    (folder / "gradio.py").write_text("raise ModuleNotFoundError(\"No module named 'gradio'\")\n")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def test_help_needs_no_gradio(without_gradio):
    done = python(ROOT / "scripts" / "demo.py", "--help", **without_gradio)
    assert done.returncode == 0
    assert "--max_upload_bytes" in done.stdout


def test_a_missing_gradio_is_one_line_that_says_how_to_get_it(without_gradio):
    done = python(ROOT / "scripts" / "demo.py", "--run", "nowhere", **without_gradio)
    assert done.returncode == 1
    assert done.stderr == "error: the demo needs gradio: pip install 'tessera-codes[demo]' (No module named 'gradio')\n"
