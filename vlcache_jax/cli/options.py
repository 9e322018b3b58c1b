"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from vlcache_jax.cache.methods import DEFAULT_METHOD, METHODS, VLCache

Model = Annotated[
    str,
    typer.Argument(
        help="A model directory (Hugging Face format or converted), a GGUF file, a hub id such as "
        "llava-hf/llava-v1.6-mistral-7b-hf, or a model of this package, 'demo' or 'demo-small'."
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub id; its main branch by default.")
]
Prompt = Annotated[
    str | None,
    typer.Option(
        help="The question. <image> marks say where images go; else they come first. Without it a "
        "demo picture's own question is asked."
    ),
]
Image = Annotated[
    list[str] | None,
    typer.Option(
        help="An image file, or a picture of this package: 'demo' or demo:1, demo:2, ... and "
        "'demo-small' or demo-small:1, ... ('vlcache info demo' lists them). Give the option once "
        "for each image."
    ),
]
Video = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="A video: an animated GIF or WebP, or a film (needs the package av). Give the option "
        "once for each. <video> marks in the prompt say where videos go; else they come behind the "
        "images.",
    ),
]
Frames = Annotated[
    int | None,
    typer.Option(
        help="Frames of each video that the model is shown, evenly chosen; by default what the "
        "checkpoint's processor says, often all of them."
    ),
]
Context = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.txt",
        help="A text that the question is about, put in front of it; the cache keeps a part of it "
        "as of a picture.",
    ),
]
PrefillChunk = Annotated[
    int | None,
    typer.Option(
        help="Rows of the prompt that are run at a time, 2048 for instance: a long prompt then "
        "takes no more memory beside its cache than so many rows. All of them by default."
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens of the answer.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        help="End the answer in front of this text. Give the option once for each; \\n stands "
        "for a new line."
    ),
]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token.")]
TopK = Annotated[int | None, typer.Option(help="Draw among the k most likely tokens.")]
TopP = Annotated[
    float, typer.Option(help="Draw among the tokens that reach this probability together.")
]
Seed = Annotated[int, typer.Option(help="Seed of the draws.")]
RawPrompt = Annotated[
    bool, typer.Option("--raw-prompt", help="Take the prompt as given, without the chat template.")
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own by default.")
]
COMPARED = tuple(dict.fromkeys((DEFAULT_METHOD, VLCache.name)))
"""What commands that compare run where no method is named: the default, and the paper's."""

METHOD_HELP = f"What the cache keeps of the prompt: {', '.join(METHODS)}."

BUDGET_HELP = (
    "How much of it: a share of the cache such as 0.1, or tokens per layer such as 256tok. 0.1 by "
    "default."
)
BITS_HELP = (
    "Quantize what is kept: 2, 4 or 8 bits for every token; akvq, which gives 16 or 4 bits to the "
    "tokens that matter most and 2 to the others; kivi, 2 bits with keys by channel. 16, the "
    "default, leaves it as it is. With --method full everything is kept, quantized."
)
EACH = "Give the option once for each"
Method = Annotated[str, typer.Option(help=METHOD_HELP)]
Methods = Annotated[
    list[str] | None,
    typer.Option("--method", help=f"{METHOD_HELP} {EACH}; {' and '.join(COMPARED)} by default."),
]
KvBudget = Annotated[str | None, typer.Option(help=BUDGET_HELP)]
KvBudgets = Annotated[list[str] | None, typer.Option("--kv-budget", help=f"{BUDGET_HELP} {EACH}.")]
KvBits = Annotated[str | None, typer.Option(help=BITS_HELP)]
KvBitsList = Annotated[list[str] | None, typer.Option("--kv-bits", help=f"{BITS_HELP} {EACH}.")]
Backend = Annotated[
    str | None,
    typer.Option(
        envvar="VLCACHE_BACKEND",
        help="Attention kernels: triton, cudnn (the prefill only) or xla; by default the best for "
        "the device. On a CPU triton is interpreted, for tests, and slow.",
    ),
]
Mesh = Annotated[
    str | None,
    typer.Option(
        metavar="model=4,data=2",
        help="Devices that run the model together: `model` splits its heads, MLP and vocabulary, "
        "`data` a batch's requests. One device by default.",
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.html", help="The page to write, or with a name in .json the numbers."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
