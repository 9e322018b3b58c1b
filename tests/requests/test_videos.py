"""Videos of any kind: what is read of them, which frames are chosen, and what is refused."""

import io

import numpy as np
import pytest
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from tests.cli.program import refused
from tests.tiny import picture, tiny_config, tiny_processor
from tests.tiny_qwen import qwen_json, qwen_processor
from vlcache_jax import Video
from vlcache_jax.models.families import read_config
from vlcache_jax.models.qwen_vl.frames import choose_frames, frame_size
from vlcache_jax.models.qwen_vl.packing import PROCESSORS
from vlcache_jax.requests.processing import Processor
from vlcache_jax.requests.video_settings import VideoSettings
from vlcache_jax.requests.videos import Shape, as_videos, evenly, load_video

FRAMES = [picture(20, 12, seed) for seed in range(7)]
ARRAY = np.stack([np.asarray(frame) for frame in FRAMES])


def every(shape):
    return np.arange(shape.frames)


def animation(kind, **options):
    file = io.BytesIO()
    FRAMES[0].save(file, kind, save_all=True, append_images=FRAMES[1:], **options)
    return file.getvalue()


def film(path, frames=12, rate=10):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for shade in range(frames):
            grey = np.full((48, 64, 3), 20 * shade % 256, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        file.mux(stream.encode())
    return path


@pytest.fixture(scope="module", params=["llava_onevision", *PROCESSORS])
def processor(request):
    if request.param in PROCESSORS:
        return Processor(read_config(qwen_json(request.param)), qwen_processor(request.param))
    return Processor(tiny_config(request.param), tiny_processor(request.param))


class TestReading:
    @pytest.mark.parametrize(
        ("source", "fps"),
        [
            (FRAMES, None),
            (tuple(FRAMES), None),
            (list(ARRAY), None),
            (ARRAY, None),
            (ARRAY.transpose(0, 3, 1, 2), None),
            (np.float32(ARRAY) / 255, None),
            (Video(FRAMES, 3), 3),
            (Video(ARRAY, 0.5), 0.5),
            (animation("WEBP", duration=250, lossless=True), 4),
            (animation("PNG", duration=500), 2),
            (memoryview(animation("TIFF")), None),
        ],
        ids=range(11),
    )
    def test_any_kind_has_the_same_frames(self, source, fps):
        [video] = as_videos(source)
        clip = load_video(video, lambda shape: evenly(shape, 3))
        assert clip.shape == (7, 12, 20, fps)
        assert clip.chosen.tolist() == [0, 2, 4]
        for frame, index in zip(clip.frames, clip.chosen, strict=True):
            np.testing.assert_array_equal(frame, FRAMES[index])
        assert load_video(clip, every) is clip

    def test_files_and_lists_of_files(self, tmp_path):
        (tmp_path / "a.gif").write_bytes(animation("GIF", duration=100))
        files = [tmp_path / f"{number}.png" for number in range(7)]
        for frame, file in zip(FRAMES, files, strict=True):
            frame.save(file)
        clip = load_video(str(tmp_path / "a.gif"), every)
        assert (clip.name, clip.shape.fps, clip.fps, len(clip.frames)) == ("a.gif", 10, 10, 7)
        [nested] = as_videos([files])
        np.testing.assert_array_equal(load_video(nested, every).frames[6], FRAMES[6])
        assert as_videos(files) == files  # each is a video of its own
        still = load_video(files[0], every)
        assert (still.shape, still.fps) == ((1, 12, 20, None), 24)

    def test_a_film(self, tmp_path):
        path = film(tmp_path / "a.mp4")
        clip = load_video(path, lambda shape: evenly(shape, 4))
        assert clip.shape == (12, 48, 64, 10)
        assert (clip.chosen.tolist(), clip.name) == ([0, 3, 6, 9], "a.mp4")
        shades = [np.asarray(frame).mean() for frame in clip.frames]
        np.testing.assert_allclose(shades, [0, 60, 120, 180], atol=3)
        np.testing.assert_allclose(clip.fps, 10 / 3)
        whole = load_video(film(tmp_path / "a.mkv").read_bytes(), every)  # says no count
        assert (len(whole.frames), whole.shape) == (12, (12, 48, 64, 10))

    def test_a_film_that_is_shorter_than_it_says(self, tmp_path):
        content = film(tmp_path / "a.mkv", frames=40).read_bytes()
        cut = load_video(content[: len(content) // 2], every)
        assert 0 < len(cut.frames) == cut.shape.frames < 40

    @pytest.mark.parametrize(
        ("source", "words"),
        [
            ([[]], "a video needs at least one frame"),
            (np.zeros((0, 4, 4, 3), np.uint8), "a video needs at least one frame"),
            (np.zeros((2, 2, 4, 4, 3), np.uint8), r"an array of shape \(2, 2, 4, 4, 3\) is not a"),
            (5, "the value 5 is not a video: give a file, a list of frames"),
            ({"a": 1}, "is not a video"),
            ([[FRAMES[0], picture(9, 9)]], "of one size, not 20 x 12 and 9 x 9 pixels"),
            ([[FRAMES[0], "no.png"]], "no image file at no.png"),
            (Video(FRAMES, 0), "fps=0.0 must be above 0"),
            (Video(FRAMES, float("nan")), "fps=nan must be above 0"),
            (Video(FRAMES, "2"), "fps=2 must be a number"),  # pyright: ignore[reportArgumentType]
            ("no.mp4", "no video file no.mp4"),
            ("https://a.b/c.mp4", "no video is fetched: download it"),
            (b"no video", "the video of 8 bytes is no (animation|video)"),
            (animation("GIF")[:900], "the video of 900 bytes is damaged or truncated"),
        ],
    )
    def test_what_is_no_video_is_refused_in_a_line(self, source, words):
        with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
            load_video(as_videos(source)[0], every)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400

    def test_a_film_names_the_package_that_it_needs(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "av", None)
        with pytest.raises(ValueError, match=r"need the package av: pip install 'vlcache-jax\[vid"):
            load_video(b"ftypisom", every)


class TestFrames:
    @pytest.mark.parametrize("total", [1, 2, 7, 32, 100])
    def test_onevision_chooses_as_transformers_does(self, total):
        for count in range(1, total + 1):
            theirs = default_sample_indices_fn(VideoMetadata(total), num_frames=count)
            assert evenly(Shape(total, 9, 9), count).tolist() == theirs.tolist()

    @pytest.mark.parametrize("total", [1, 2, 7, 32, 100])
    def test_qwen_chooses_an_even_number(self, total):
        torch = pytest.importorskip("torch")
        shape, settings = Shape(total, 9, 9), VideoSettings()
        for asked in range(1, total + 1):
            chosen = choose_frames(shape, asked, settings)
            even = 2 * round(asked / 2)
            if not 2 <= even <= total:  # transformers raises
                assert len(chosen) == min(total, max(even, 2))
                continue
            theirs = torch.arange(0, total, total / even).int()[:even]  # has one more at times
            assert chosen.tolist() == theirs.tolist()
        assert choose_frames(shape, None, settings).tolist() == list(range(total))

    @pytest.mark.parametrize(
        ("frames", "fps", "expected"),
        [(100, 25, 8), (100, 200, 4), (3, 1, 2), (1, 1, 1), (90, 1, 20)],
    )
    def test_qwen_frames_of_a_second(self, frames, fps, expected):
        settings = VideoSettings({"do_sample_frames": True, "fps": 2, "max_frames": 21})
        assert len(choose_frames(Shape(frames, 9, 9, fps), None, settings)) == expected
        with pytest.raises(ValueError, match="takes 2 frames of each second, and it is not known"):
            choose_frames(Shape(frames, 9, 9), None, settings)

    def test_settings_are_found_where_transformers_finds_them(self, tmp_path):
        assert VideoSettings.find(tmp_path).count is None
        files = ("preprocessor_config.json", "video_preprocessor_config.json")
        for count, name in enumerate(files, 3):
            text = f'{{"do_sample_frames": true, "num_frames": {count}}}'
            (tmp_path / name).write_text(text)
            assert VideoSettings.find(tmp_path).count == count
            (tmp_path / "processor_config.json").write_text('{"image_processor": {}}')
        (tmp_path / "processor_config.json").write_text(f'{{"video_processor": {text}}}')
        assert VideoSettings.find(tmp_path).file == tmp_path / "processor_config.json"

    def test_sizes_of_frames(self):
        usual = VideoSettings()
        assert frame_size(Shape(2, 1080, 1920), 2, 28, usual) == (560, 1008)
        own = {"min_pixels": 28 * 28, "max_pixels": 40 * 28 * 28}
        assert frame_size(Shape(2, 1080, 1920), 2, 28, VideoSettings(own)) == (112, 224)
        capped = VideoSettings({"cap_pixels_per_frame": True, "max_video_tokens": 2000})
        assert frame_size(Shape(99, 1080, 1920), 99, 28, capped) == (224, 420)
        with pytest.raises(ValueError, match="frames of 900 x 2 pixels cannot be resized"):
            frame_size(Shape(1, 2, 900), 1, 28, usual)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"do_resize": False}, "do_resize=False must be true"),
            ({"do_center_crop": True}, "do_center_crop=True must be false"),
            ({"resample": 1}, "resample=1 must be 2 or 3"),
            ({"image_std": [0, 0, 0]}, "image_std must be three numbers other than 0"),
            ({"image_mean": 0.5}, "image_mean=0.5 must be a list of three numbers"),
            ({"num_frames": 0, "do_sample_frames": True}, "num_frames=0 must be a whole number"),
        ],
    )
    def test_settings_that_are_not_followed_are_refused_with_the_first_video(
        self, settings, words, processor
    ):
        own = processor._packing.processor
        before = own.video_settings
        try:
            own.video_settings = VideoSettings({**before.data, **settings})
            assert processor(picture(20, 20), "what?").tokens.size  # pictures do not need them
            with pytest.raises((ValueError, NotImplementedError), match=words):
                processor(None, "what?", videos=ARRAY)
        finally:
            own.video_settings = before


class TestPrompts:
    def test_places_of_pictures_and_videos(self, processor):
        def order(text):
            inputs = processor([picture(20, 20)] * 2, text, videos=[FRAMES, ARRAY])
            tokens = inputs.tokens[inputs.visual_index >= 0]
            kinds = processor.is_video(tokens)
            return kinds[np.flatnonzero(np.diff(kinds, prepend=~kinds[0]))].tolist()

        assert order("what?") == [False, True]
        assert order("<video>a<image>b<video>c<image>") == [True, False, True, False]
        assert order("a<image>b<image>") == [True, False]  # the videos in front
        parts = [{"type": kind} for kind in ("video", "image", "image", "video")]
        content = [*parts, {"type": "text", "text": "what?"}]
        assert order([{"role": "user", "content": content}]) == [True, False, True]

    def test_a_context_is_found_behind_a_video(self, processor):
        inputs = processor(None, "what?", videos=FRAMES, frames=2, context="A lamp.")
        own = inputs.tokens[inputs.visual_index == -2]
        assert processor.tokenizer.decode(own) == "A lamp."

    @pytest.mark.parametrize(
        ("asked", "words"),
        [
            ({"text": "<video>"}, "1 .*marks in the text but 0 videos"),
            ({"text": "<video>", "videos": [FRAMES, ARRAY]}, "1 .* marks .* but 2 videos: give"),
            ({"text": "a", "videos": ARRAY, "frames": 8}, "8 frames are asked for, but the .* 7"),
            ({"text": "a", "videos": ARRAY, "frames": 0}, "frames=0 must be at least 1"),
            ({"text": "a", "videos": ARRAY, "frames": 1.5}, "frames=1.5 must be a whole number"),
            ({"text": "a", "frames": 2}, "frames=2 but no videos"),
            ({"text": ["a", "b"], "videos": [ARRAY]}, "2 texts but 1 entries in videos"),
            (
                {"text": "a", "videos": np.repeat(ARRAY, 3000, 0)},
                "21000 of the video's 21000 frames",
            ),
        ],
    )
    def test_what_does_not_fit_is_refused(self, asked, words, processor):
        with pytest.raises(ValueError, match=words):
            processor(None, **asked)

    def test_models_without_videos_refuse_them(self):
        file = animation("GIF")
        for family in ("llava", "llava_next"):
            with pytest.raises(ValueError, match=r"^the model takes no videos: give frames"):
                Processor(tiny_config(family), tiny_processor(family))(None, "a", videos=file)


class TestPatches:
    @pytest.mark.parametrize("count", [1, 2, 7])
    def test_tokens_of_each_frame_show_all_of_it(self, processor, count):
        [clip] = processor.clips(FRAMES, count)
        inputs = processor(None, "what?", videos=clip)
        found = processor.frame_patches(clip)
        assert sum(len(each.part) for each in found) == (inputs.visual_index >= 0).sum()
        for each in found:
            places = each.rectangles[~np.isnan(each.rectangles[:, 0])]
            assert (*places[:, :2].min(0), *places[:, 2:].max(0)) == (0, 0, 20, 12)
            sides = places[:, 2:] - places[:, :2]
            np.testing.assert_allclose(sides.prod(axis=1).sum(), 20 * 12)
        newlines = [int(np.isnan(each.rectangles[:, 0]).sum()) for each in found]
        onevision = "onevision" in processor.config.family
        assert newlines == [0] * (len(found) - 1) + [int(onevision)]


def test_the_command_line(onevision_dir, tmp_path):
    file = tmp_path / "a.gif"
    file.write_bytes(animation("GIF"))
    asked = ("generate", onevision_dir, "--prompt", "what?", "--video", file)
    refused("9 frames are asked for, but the video has 7", *asked, "--frames", "9")
    refused("no video file", *asked[:-1], tmp_path / "none.gif")
    refused("frames=2 but no videos", *asked[:4], "--frames", "2")
