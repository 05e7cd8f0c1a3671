"""The command line: `diptych run | parity | bench | plan | generate | eval | export | weights | recipe | ...`.

Exit codes (`parity` has its own): 0 done; 2 something that the user can mend (one line says what, where and what to
do); 3 a run-time invariant broke; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diptych import __version__, random
from diptych.bench.cli import add_bench_command, bench_command
from diptych.engine import ENGINES, EngineSettings, Memory, ModelSpec, Sampling, load_engine
from diptych.errors import InvariantError, UserError
from diptych.parity import cli as parity

_RUN_EPILOG = """\
examples:
  diptych run recipes/quickstart.yaml --engine jax --output out/jax
  diptych run recipes/quickstart.yaml --engine torch --output out/torch rl.iterations=20 seed=1
  diptych run recipes/quickstart.yaml --engine torch --stage reward --output out/mixed \\
      reward.model_path=out/jax/models/sft        (one engine goes on from the other's model)
  diptych run recipes/quickstart.yaml --engine jax --output out/jax --resume
  srun diptych run recipes/quickstart.yaml --engine jax --output out/jax --distributed    (one process per node)
  torchrun --nproc-per-node 8 --no-python diptych run recipes/quickstart.yaml --engine torch --output out/torch \\
      --distributed layout.zero.stage=2           (one process per GPU)

A run directory holds recipe.yaml (resolved), environment.json, metrics.jsonl, tensorboard/, samples.jsonl,
checkpoints/, models/{sft,reward,rl,...} in Hugging Face format, summary.json and report.html.
"""

_PLAN_EPILOG = """\
examples:
  diptych plan recipes/plans/llama-3-8b-v5e.yaml --topology v5e:16x16
  diptych plan recipes/plans/llama-3-8b-v5p.yaml --topology v5p:2x2x4 --search --html plan.html
  diptych plan recipes/quickstart.yaml --topology cpu:8 layout.train.tensor=2
  diptych plan my.yaml --topology v6e:8x8 --efficiency 0.5 --price 1.9 --gpu h200 --gpus 32 --json plan.json
  diptych plan my.yaml --engine torch --gpu h200 --gpus 8 layout.zero.stage=3    (memory alone, in a second)

Compiles the very programs that the JAX engine would run (train step, scoring, switch, decoding) for machines that need
not be there, and prints: does it fit; each device's memory by part and phase; collectives; FLOPs; the roofline of each
phase, the tokens per second and dollars that follow, and all that was assumed. Beside it the same recipe on DeepSpeed,
by ZeRO's arithmetic. Of the models only config.json is read; no weights, data or tokenizer. TPU topologies need
pip install 'diptych[plan]' (a compiler of about 1 GB), and no TPU. A large model takes minutes. Exit code 2: it does
not fit, and the part that is too large is named.
"""


_FROM_DSCHAT_EPILOG = """\
examples:
  diptych recipe from-dschat -o sft.yaml -- deepspeed --num_gpus 1 training/step1_supervised_finetuning/main.py \\
      --model_name_or_path facebook/opt-1.3b --gradient_accumulation_steps 8 --lora_dim 128
  diptych recipe from-dschat --gpus 8 --prompts 30500 --into sft.yaml -o all.yaml -- \\
      deepspeed main.py --actor_model_name_or_path out/sft --critic_model_name_or_path out/reward --actor_zero_stage 2

Everything after `--` is the command line, as words or as one quoted text (quote it where it redirects its output, or
the shell will redirect this command's). The recipe goes to stdout or FILE; what became of each flag is told on stderr
and in the recipe's first lines. docs/deepspeed_chat.md has the whole table.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `diptych` command; returns the exit code."""
    parser = _parser()
    # argparse cannot mix a positional list with options, so key=value settings are taken from what it leaves over.
    options, left_over = parser.parse_known_args(arguments)
    options.overrides = left_over
    unknown = [text for text in left_over if "=" not in text or text.startswith("-")]
    if unknown or (left_over and options.command not in (_run, _recipe_show, _plan, bench_command, *parity.SETTINGS)):
        parser.error(f"unrecognized arguments: {' '.join(unknown or left_over)} (settings are written key=value)")
    try:
        return options.command(options)
    except UserError as error:
        print(f"diptych: error: {error}", file=sys.stderr)
        return 2
    except InvariantError as error:
        print(f"diptych: stopped: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("diptych: interrupted; go on from the last checkpoint with --resume", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diptych", description="One RLHF recipe, two engines (PyTorch + DeepSpeed, JAX), the same numbers."
    )
    parser.add_argument("--version", action="version", version=f"diptych {__version__}")
    # The deepspeed launcher puts it before everything else; it also sets LOCAL_RANK, which is what the engine reads.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter

    run = commands.add_parser(
        "run",
        help="run a recipe's stages on one engine",
        usage="diptych run RECIPE --engine {jax,torch} [--stage STAGE] [--output DIR] [--resume] [--distributed] "
        "[key=value ...]",
        epilog=_RUN_EPILOG,
        formatter_class=raw,
    )
    run.add_argument("recipe", type=Path, help="a YAML recipe")
    run.add_argument("--engine", required=True, choices=list(ENGINES), help="which engine trains and generates")
    run.add_argument("--stage", choices=["sft", "reward", "rl"], action="append", help="only this stage (repeatable)")
    run.add_argument("--output", type=Path, help="run directory (default: out/RECIPE-ENGINE)")
    run.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run directory")
    run.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of several processes that were started with this same command, on one host or many. torch: "
        "by torchrun, deepspeed, srun or mpirun; jax: Slurm, TPU slices and GKE are recognised, elsewhere set "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID (docs/clusters.md)",
    )
    run.set_defaults(command=_run)

    generate = commands.add_parser(
        "generate",
        help="print a model's answer to a prompt",
        epilog="example:\n  diptych generate out/jax/models/rl --engine torch --prompt 'Write a postcard from Rome.'",
        formatter_class=raw,
    )
    generate.add_argument("model", type=Path, help="a Hugging Face model directory")
    generate.add_argument("--engine", required=True, choices=list(ENGINES))
    generate.add_argument("--prompt", required=True, help="text; goes through the chat template where there is one")
    generate.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1)")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--seed", type=int, default=0, help="the same seed gives the same text on either engine")
    generate.add_argument("--top-k", type=int, default=0, help="0: all tokens")
    generate.add_argument("--top-p", type=float, default=1.0, help="1: all tokens")
    generate.add_argument("--plain", action="store_true", help="do not use the chat template")
    generate.add_argument("--precision", choices=["float32", "float64"], default="float32")
    generate.set_defaults(command=_generate)

    parity.add_parity_command(commands)
    add_bench_command(commands)
    _add_plan_command(commands)
    _add_model_commands(commands)

    recipe = commands.add_parser("recipe", help="look at recipes")
    actions = recipe.add_subparsers(required=True, metavar="ACTION")
    show = actions.add_parser(
        "show", help="print the resolved recipe, defaults included", usage="diptych recipe show RECIPE [key=value ...]"
    )
    show.add_argument("recipe", type=Path)
    show.set_defaults(command=_recipe_show)
    schema = actions.add_parser(
        "schema",
        help="print the JSON schema of recipes, for editors",
        epilog="In an editor with a YAML language server, put this line first in a recipe:\n"
        "  # yaml-language-server: $schema=recipe.schema.json",
        formatter_class=raw,
    )
    schema.set_defaults(command=_recipe_schema)
    dschat = actions.add_parser(
        "from-dschat",
        help="write the recipe that does what a DeepSpeed-Chat command line does",
        usage="diptych recipe from-dschat [-o FILE] [--step N] [--gpus N] [--prompts N] [--into RECIPE] -- COMMAND",
        epilog=_FROM_DSCHAT_EPILOG,
        formatter_class=raw,
    )
    dschat.add_argument("-o", "--output", type=Path, help="write the recipe here (default: stdout)")
    dschat.add_argument("--step", type=int, choices=[1, 2, 3], help="where neither flags nor main.py's path tell it")
    dschat.add_argument("--gpus", type=int, help="on how many it ran, where the command does not say (all nodes' sum)")
    dschat.add_argument("--prompts", type=int, help="how many prompts step 3 has: rl.iterations follows")
    dschat.add_argument("--into", type=Path, metavar="RECIPE", help="add the step to what this recipe holds")
    dschat.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="the command line")
    dschat.set_defaults(command=_recipe_from_dschat)

    compare = commands.add_parser("compare", help="two runs of one recipe side by side: numbers and differences")
    compare.add_argument("a", type=Path, help="a run directory")
    compare.add_argument("b", type=Path, help="another")
    compare.add_argument("--brief", action="store_true", help="only the results and each stage's largest difference")
    compare.add_argument("--html", type=Path, help="also write a self-contained page with both runs' curves")
    compare.set_defaults(command=_compare)

    report = commands.add_parser("report", help="write report.html of a run again")
    report.add_argument("run", type=Path, help="a run directory")
    report.set_defaults(command=_report)
    return parser


def _add_plan_command(commands: argparse._SubParsersAction) -> None:
    plan = commands.add_parser(
        "plan",
        help="what a recipe needs of a machine before it is rented: memory, time, money",
        usage="diptych plan RECIPE --topology CHIP:GRID [--search] [--json FILE] [--html FILE] [...] [key=value ...]\n"
        "       diptych plan RECIPE --engine torch --gpus N [--gpu GPU] [--host-memory GIB] [key=value ...]",
        epilog=_PLAN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument("recipe", type=Path, help="a YAML recipe")
    plan.add_argument("--topology", help="v5e:16x16, v6e:8x8 (a grid of chips), v5p:2x2x4 (a cube), or cpu:8")
    plan.add_argument(
        "--engine",
        choices=list(ENGINES),
        default="jax",
        help="torch: memory alone, as `diptych run` counts it at start",
    )
    plan.add_argument("--search", action="store_true", help="look for the best meshes and micro-batch that fit")
    plan.add_argument("--efficiency", type=float, default=1.0, help="share of every peak that is reached (default: 1)")
    plan.add_argument("--price", type=float, help="dollars per chip and hour (default: list price)")
    plan.add_argument("--gpu", default="h100", help="for DeepSpeed's side: a100, h100 (default) or h200")
    plan.add_argument("--gpus", type=int, help="how many (default: as many as there are chips)")
    plan.add_argument(
        "--host-memory", type=float, help="--engine torch: GiB of host memory for each GPU (default: not looked at)"
    )
    plan.add_argument("--gpu-price", type=float, help="dollars per GPU and hour (default: a typical price)")
    plan.add_argument("--json", type=Path, help="also write everything as JSON")
    plan.add_argument("--html", type=Path, help="also write a self-contained page with the pictures")
    plan.set_defaults(command=_plan)


def _add_model_commands(commands: argparse._SubParsersAction) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    evaluate = commands.add_parser(
        "eval",
        help="a model's numbers on a file: loss, perplexity, accuracy; of a reward model pair accuracy, calibration",
        epilog="examples:\n"
        "  diptych eval out/jax/models/sft --data test.jsonl --engine jax --device cpu --json\n"
        "  diptych eval out/jax/models/reward --data pairs.jsonl --engine torch\n"
        "data: JSONL with demonstrations (response tokens count), `text` rows or preference pairs; .txt; task:NAME",
        formatter_class=raw,
    )
    evaluate.add_argument("model", type=Path, help="a Hugging Face model directory")
    evaluate.add_argument("--data", required=True, help="JSONL, .txt, or task:NAME with --limit")
    evaluate.add_argument("--engine", required=True, choices=list(ENGINES))
    evaluate.add_argument("--device", choices=["auto", "cpu"], default="auto", help="cpu: use no accelerator")
    evaluate.add_argument("--precision", choices=["float32", "float64"], default="float32")
    evaluate.add_argument("--batch-size", type=int, default=8, help="rows (or pairs) at once; changes no number")
    evaluate.add_argument("--limit", type=int, help="only the first rows of the file")
    evaluate.add_argument(
        "--max-tokens", type=int, help="longest row, or window of text (default: 2048, or the model's positions)"
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(command=_eval)

    export = commands.add_parser(
        "export",
        help="a model through an engine into a new Hugging Face directory",
        epilog="example:\n  diptych export out/jax/models/rl postcards-1b --engine jax --dtype bfloat16",
        formatter_class=raw,
    )
    export.add_argument("model", type=Path, help="a Hugging Face model directory")
    export.add_argument("output", type=Path, help="a new directory")
    export.add_argument("--engine", required=True, choices=list(ENGINES))
    export.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="auto: as each tensor is stored, bit for bit; anything less rounds",
    )
    export.add_argument("--max-shard-size", default="5GB", help="largest file (default: 5GB)")
    export.set_defaults(command=_export)

    weights = commands.add_parser("weights", help="look at a model directory's tensors")
    check = weights.add_subparsers(required=True, metavar="ACTION").add_parser(
        "check", help="print where every tensor goes, checksums, and what would not load (exit code 2)"
    )
    check.add_argument("model", type=Path, help="a Hugging Face model directory")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(command=_weights_check)


def _eval(options: argparse.Namespace) -> int:
    from diptych.evaluate import describe, evaluate

    result = evaluate(
        options.model,
        options.data,
        engine=options.engine,
        device=options.device,
        precision=options.precision,
        batch_size=options.batch_size,
        limit=options.limit,
        max_tokens=options.max_tokens,
    )
    print(json.dumps(result, indent=2) if options.json else describe(result))
    return 0


def _export(options: argparse.Namespace) -> int:
    from diptych.weights.export import export, parse_size

    size = parse_size(options.max_shard_size)
    export(options.model, options.output, engine=options.engine, dtype=options.dtype, max_shard_bytes=size)
    print(options.output)
    return 0


def _weights_check(options: argparse.Namespace) -> int:
    from diptych.weights.inspection import check_weights, describe

    report = check_weights(options.model)
    print(json.dumps(report, indent=2) if options.json else describe(report))
    return 2 if report["problems"] else 0


def _run(options: argparse.Namespace) -> int:
    from diptych.recipe.load import load_recipe
    from diptych.stages.pipeline import prepare, run_stages

    recipe = load_recipe(options.recipe, options.overrides)
    output = options.output or Path("out") / f"{recipe.name}-{options.engine}"
    context = prepare(
        recipe,
        engine_name=options.engine,
        output=output,
        stages=options.stage,
        resume=options.resume,
        distributed=options.distributed,
    )
    summary = run_stages(context, options.stage)
    if context.run.world.is_main:
        print(json.dumps(summary, indent=2))
        print(f"diptych: run in {output}, report in {output / 'report.html'}", file=sys.stderr)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from diptych.plan.plan import Options, make_plan
    from diptych.plan.report import describe, write_page
    from diptych.recipe.load import load_recipe

    if not 0 < options.efficiency <= 1:
        raise UserError(f"--efficiency {options.efficiency}: a share of the peak above 0 and up to 1")
    if options.gpus is not None and options.gpus < 1:
        raise UserError(f"--gpus {options.gpus}: at least 1")
    if options.engine == "torch":
        return _plan_launch(options)
    if options.topology is None:
        raise UserError("--topology: name the machine, like v5e:16x16 or cpu:8; or give --engine torch and --gpus")
    if options.host_memory is not None:
        raise UserError("--host-memory has no effect without --engine torch")
    recipe = load_recipe(options.recipe, options.overrides)
    chosen = Options(
        efficiency=options.efficiency,
        price=options.price,
        gpu=options.gpu,
        gpus=options.gpus,
        gpu_price=options.gpu_price,
        search=options.search,
    )
    plan = make_plan(recipe, options.topology, chosen, report=lambda line: print(f"plan: {line}", file=sys.stderr))
    print(describe(plan))
    if options.json is not None:
        options.json.write_text(json.dumps(plan.json(), indent=2) + "\n", encoding="utf-8")
    if options.html is not None:
        write_page(plan, options.html)
    return 0 if plan.fits else 2


def _plan_launch(options: argparse.Namespace) -> int:
    from diptych.plan.hardware import read_gpu
    from diptych.plan.launch import check_launch, describe_launch, plan_launch
    from diptych.recipe.load import load_recipe

    idle = [name for name in ("topology", "search", "price", "gpu_price", "json", "html") if getattr(options, name)]
    if idle or options.efficiency != 1:
        name = (idle or ["efficiency"])[0].replace("_", "-")
        raise UserError(f"--{name} has no effect with --engine torch, which counts memory alone")
    host = None if options.host_memory is None else int(options.host_memory * 2**30)
    memory = Memory(device=int(read_gpu(options.gpu).memory), host=host)
    recipe = load_recipe(options.recipe, options.overrides)
    launch = plan_launch(recipe, recipe.stages, num_processes=options.gpus or 1, memory=memory)
    print(describe_launch(launch))
    check_launch(launch)
    return 0


def _recipe_show(options: argparse.Namespace) -> int:
    from diptych.recipe.load import dump_recipe, load_recipe

    print(dump_recipe(load_recipe(options.recipe, options.overrides)), end="")
    return 0


def _recipe_from_dschat(options: argparse.Namespace) -> int:
    from diptych.recipe.dschat.account import write
    from diptych.recipe.dschat.command import read_command
    from diptych.recipe.dschat.convert import convert

    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    made = convert(read_command(words, step=options.step), gpus=options.gpus, prompts=options.prompts)
    try:
        into = None if options.into is None else options.into.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--into {options.into}: cannot be read: {error}") from None
    text, account = write(made, into=into, name=str(options.into))
    print("\n".join(account), file=sys.stderr)
    if options.output is None:
        print(text, end="")
    else:
        try:
            options.output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output {options.output}: cannot be written: {error.strerror}") from None
    return 0


def _recipe_schema(_options: argparse.Namespace) -> int:
    from diptych.recipe.json_schema import recipe_json_schema

    print(json.dumps(recipe_json_schema(), indent=2))
    return 0


def _generate(options: argparse.Namespace) -> int:
    from diptych.data.batches import prompt_batch
    from diptych.data.examples import PromptExample
    from diptych.data.tokenizer import Tokenizer, check_vocabulary
    from diptych.weights.huggingface import read_checkpoint

    if options.temperature < 0 or options.max_new_tokens < 1 or options.top_k < 0 or not 0 < options.top_p <= 1:
        raise UserError(
            "--temperature and --top-k must not be negative, --max-new-tokens at least 1, --top-p in (0, 1]"
        )
    checkpoint = read_checkpoint(options.model, precision=options.precision)
    if checkpoint.head != "lm":
        raise UserError(f"{options.model}: a model with a scalar head (reward or critic) does not generate text")
    tokenizer = Tokenizer.load(options.model)
    check_vocabulary(tokenizer, checkpoint.model.vocab_size, where=str(options.model))
    chat = tokenizer.chat_template is not None and not options.plain
    if chat:
        text = tokenizer.render([{"role": "user", "content": options.prompt}], add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False)
    else:
        prompt = tokenizer.encode(options.prompt, add_special_tokens=True)
    if not prompt:
        raise UserError("--prompt: no tokens; give some text")
    limit = checkpoint.model.max_position_embeddings
    if len(prompt) + options.max_new_tokens > limit:
        raise UserError(
            f"--max-new-tokens {options.max_new_tokens}: with a prompt of {len(prompt)} tokens the text would pass the "
            f"model's {limit} positions; at most {max(0, limit - len(prompt))} fit"
        )
    engine = load_engine(options.engine, EngineSettings(precision=options.precision))
    model = engine.model(
        ModelSpec(config=checkpoint.config, weights=checkpoint.weights, head="lm", optimizer=None, micro_batch_size=1)
    )
    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        stop_token_ids=tokenizer.eos_token_ids,
    )
    example = PromptExample(row=0, tokens=np.asarray(prompt, np.int32), text=options.prompt, data={})
    batch = prompt_batch([example], buckets=(len(prompt),), pad_token_id=tokenizer.pad_token_id)
    uniforms = random.uniforms(options.seed, "generate", step=0, rows=[0], num_positions=options.max_new_tokens)
    done = model.generate(batch, sampling, uniforms, pad_token_id=tokenizer.pad_token_id)
    response = [int(token) for token in done.tokens[0][done.mask[0]]]
    # Without a template the answer continues the prompt, and only both together decode with the right spaces.
    print(tokenizer.decode(response if chat else prompt + response, skip_special_tokens=True))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from diptych.run.compare import compare_runs, format_table, write_comparison

    print(format_table(compare_runs(options.a, options.b), every_metric=not options.brief))
    if options.html is not None:
        write_comparison(options.a, options.b, options.html)
        print(f"page: {options.html}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from diptych.run.report import write_report

    write_report(options.run)
    print(options.run / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
