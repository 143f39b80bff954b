"""`bitwright submit`: a request from flags, from a YAML or JSON file, or from a file with flags on top."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer
import yaml

from bitwright import Client
from bitwright.cli.connection import DataDirOption, KeyOption, UrlOption, connect
from bitwright.cli.job_details import preflight_table
from bitwright.cli.jobs import JsonOption, parse_labels, print_json
from bitwright.cli.render import err, out
from bitwright.cli.watch import finish, follow_job
from bitwright.errors import MalformedBody, RequestError
from bitwright.request import shorthand_fields

ROW_KINDS = ("text", "completion", "messages", "tools")
"""Kinds of rows that a part of a mixture may name."""


def submit(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, folder, or id of an upload or of a job to finetune.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Request as YAML or JSON; - is standard input. Flags win.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Method or recipe: see `bitwright methods`.")] = None,
    bits: Annotated[int | None, typer.Option(help="Width of a weight, 2 to 8.")] = None,
    average_bits: Annotated[
        float | None, typer.Option(help="In place of bits: the mean of widths that the job chooses, e.g. 2.75.")
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(help="In place of bits and groups: a number format or llama.cpp type, e.g. fp8, nvfp4, q4_k."),
    ] = None,
    at_most_kl: Annotated[
        float | None, typer.Option(help="In place of bits: the smallest result this close, nats per token.")
    ] = None,
    at_most_bytes: Annotated[
        str | None, typer.Option(help="In place of bits: the closest result this small, e.g. 90MB.")
    ] = None,
    fits_memory: Annotated[
        str | None, typer.Option(help="In place of bits: what serves in this memory, e.g. 24GB, with --context.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="With --fits-memory: tokens of a sequence.")] = None,
    sequences: Annotated[int | None, typer.Option(help="With --fits-memory: sequences at a time.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Input columns that share a scale; -1: all.")] = None,
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="Form of the scheme.")] = None,
    preset: Annotated[str | None, typer.Option(help="light, default or best.")] = None,
    steps: Annotated[int | None, typer.Option(help="Tuning steps per block.")] = None,
    scale_steps: Annotated[int | None, typer.Option(help="Steps that tune all scales together; 0: none.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the adapter, or of the method's low-rank factors.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Kind of adapter to train, e.g. lora; a recipe names it itself.")
    ] = None,
    merge: Annotated[str | None, typer.Option(help="Put the adapter into the weights: quantized or 16bit.")] = None,
    train: Annotated[
        str | None, typer.Option(help="Text that an adapter learns: Hub id, upload, or JSONL, which is sent.")
    ] = None,
    train_steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="In place of steps: times that the text is read.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a training step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the training, after warm-up.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Calibration text: builtin, generated, Hub id, JSONL, upload.")
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(help="Part of a calibration mixture, SOURCE=SHARE or SOURCE:KIND=SHARE; shares add up to 1."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens a calibration sequence.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Rows to ask both models, NAME=KIND:SOURCE; multiple_choice, exact_match, perplexity, chat."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Draws of the evaluation text.")] = None,
    evaluation: Annotated[bool, typer.Option("--evaluation/--no-evaluation", help="Measure before and after.")] = True,
    ignore: Annotated[list[str] | None, typer.Option(help="Pattern of linears to leave as they are.")] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="PATTERN=BITS or PATTERN=SCHEME for the linears that match.")
    ] = None,
    embeddings: Annotated[str | None, typer.Option(help="Bits of the embeddings, or a scheme by name.")] = None,
    head: Annotated[str | None, typer.Option(help="The same of the output head.")] = None,
    format: Annotated[
        list[str] | None, typer.Option("--format", help="Checkpoint format: see `bitwright formats`.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same request and seed: same codes.")] = None,
    device: Annotated[str | None, typer.Option(help="any, cpu or cuda.")] = None,
    priority: Annotated[int | None, typer.Option(help="Higher runs first.")] = None,
    time_limit: Annotated[int | None, typer.Option(help="Seconds after which an attempt fails.")] = None,
    max_perplexity_ratio: Annotated[float | None, typer.Option(help="Fail above this ratio.")] = None,
    max_kl_divergence: Annotated[float | None, typer.Option(help="Fail above this divergence, nats per token.")] = None,
    min_top1_agreement: Annotated[float | None, typer.Option(help="Fail below this share.")] = None,
    max_kl_of_kinds: Annotated[
        float | None, typer.Option(help="Fail above this divergence on any part of the mixture.")
    ] = None,
    verify: Annotated[str | None, typer.Option(help="What runtimes read of the result: block, files or off.")] = None,
    require_load: Annotated[
        list[str] | None, typer.Option(help="Fail unless this runtime loads the result: vllm, llama.cpp, ...")
    ] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="A label, name=value.")] = None,
    name: Annotated[
        str | None, typer.Option(help="The result's name for `hf download` and others: name or org/name.")
    ] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key never makes a second job.")] = None,
    hub_token_file: Annotated[
        Path | None,
        typer.Option(help="File with a Hub token for this job alone; the service forgets it at the job's end."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, and print the full request with estimates; queue nothing.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the job; the exit code tells how it ended.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Submit a job. Prints its id; with --wait, follows it to its end."""
    body = read_request(file) if file is not None else {}
    set_fields(body, {"model": _absolute(model), "seed": seed, "device": device, "priority": priority})
    set_fields(body, {"time_limit_seconds": time_limit})
    grid: dict[str, Any] = {"bits": width(bits, average_bits), "group_size": group_size, "symmetric": symmetric}
    grid |= {"scheme": scheme, **goal_fields(at_most_kl, at_most_bytes, fits_memory, context, sequences)}
    tuning = {"method": method, "preset": preset, "steps": steps, "scale_steps": scale_steps}
    outer = {"embeddings": parse_scheme(embeddings), "head": parse_scheme(head)}
    set_quantization(body, grid | tuning, ignore, parse_overrides(override), outer)
    training = {"steps": train_steps, "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    set_training(body, {"dataset": _absolute(train), **training}, adapter, rank, merge)
    text = parse_mixture(mix) if mix else _absolute(dataset)
    calibration = {"dataset": text, "num_samples": samples, "sequence_length": sequence_length}
    set_section(body, "calibration", calibration)
    set_section(body, "evaluation", {"tasks": parse_tasks(task) or None, "seeds": seeds})
    limits = {"max_perplexity_ratio": max_perplexity_ratio, "max_kl_divergence": max_kl_divergence}
    limits |= {"min_top1_agreement": min_top1_agreement, "max_kl_of_kinds": max_kl_of_kinds}
    set_section(body, "require", {**limits, "loads": require_load})
    set_section(body, "metadata", parse_labels(metadata))
    set_fields(body, {"formats": format, "verify": verify, "name": name})
    if not evaluation:
        body["evaluation"] = None
    with connect(url, key, data_dir) as client:
        send_files(client, body, [_absolute(train), *(part["dataset"] for part in _parts(body))])
        if dry_run:
            answer = client.preflight(body)
            print_json(answer) if as_json or not out().is_terminal else out().print(preflight_table(answer))
            return
        token = None if hub_token_file is None else read_token(hub_token_file)
        job = client.submit(body, idempotency_key=idempotency_key, hub_token=token)
        if not wait:
            print_json(job) if as_json else typer.echo(job.id)
            return
        err().print(job.id)
        job = follow_job(client, job.id, err() if as_json else out())
        artifacts = client.artifacts(job.id)
    finish(job, artifacts, as_json=as_json)


def read_token(path: Path) -> str:
    """The token in a file.

    Raises:
        RequestError: it cannot be read. What it holds is not shown.
    """
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        hint = "name a file that holds the token alone"
        raise RequestError(f"{path} holds no token", field="hub_token_file", hint=hint) from error


def read_request(path: Path) -> dict[str, Any]:
    """The request in a YAML or JSON file (JSON is YAML); "-" is standard input.

    Raises:
        MalformedBody: it cannot be read, or is not an object.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        body = _StrictLoader(text).get_single_data()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        hint = "write a YAML or JSON object with the request's fields, each once"
        raise MalformedBody(f"{path} is not a readable YAML or JSON file: {error}", field="file", hint=hint) from error
    if not isinstance(body, dict):
        hint = "begin with lines such as `model: org/name` and `method: gptq`"
        detail = f"{path} holds {type(body).__name__}, not an object with the request's fields"
        raise MalformedBody(detail, field="file", hint=hint)
    return body


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe subset, without duplicate keys in a mapping: YAML itself silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping as a dict.

        Raises:
            yaml.constructor.ConstructorError: a name stands twice.
        """
        names = [name.value for name, _ in node.value]
        for name_node, _ in node.value:
            if names.count(name_node.value) > 1 and name_node.tag != "tag:yaml.org,2002:merge":
                problem = f"{name_node.value} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, name_node.start_mark)
        return super().construct_mapping(node, deep)


def set_fields(body: dict[str, Any], flags: dict[str, Any]) -> None:
    """Put the flags that were given into `body`."""
    body.update({name: value for name, value in flags.items() if value is not None})


def set_section(body: dict[str, Any], name: str, flags: dict[str, Any]) -> None:
    """Put the flags that were given into the object `body[name]`."""
    given = {field: value for field, value in flags.items() if value is not None}
    if given:
        body[name] = {**(body.get(name) or {}), **given}


def set_quantization(
    body: dict[str, Any],
    flags: dict[str, Any],
    ignore: list[str] | None,
    overrides: dict[str, dict[str, int | str]],
    outer: Mapping[str, int | str | None] = MappingProxyType({}),
) -> None:
    """Put method and scheme where the request has them: inside `quantization` if it is there, else in shorthand.

    outer   schemes of embeddings and head
    """
    rules: dict[str, Any] = {}
    set_fields(rules, {"ignore": ignore or None, "overrides": overrides or None, **outer})
    if rules and "quantization" not in body:  # the shorthand has no module rules
        body["quantization"] = {name: body.pop(name) for name in shorthand_fields(body)}
    target = body.get("quantization", body)
    if not isinstance(target, dict):
        hint = "write its fields below it, or at the top without it"
        raise RequestError("quantization must be an object", field="quantization", value=target, hint=hint)
    set_fields(target, flags)
    set_section(target, "modules", rules)


def set_training(
    body: dict[str, Any], training: dict[str, Any], adapter: str | None, rank: int | None, merge: str | None
) -> None:
    """Put what is trained where the request has it; a rank without a kind belongs to the method or its recipe."""
    set_section(body, "finetune", training)
    set_fields(body, {"merge": merge})
    if adapter is not None or isinstance(body.get("adapter"), dict):
        set_section(body, "adapter", {"kind": adapter, "rank": rank})
    else:
        set_fields(body.get("quantization", body), {"rank": rank})


def send_files(client: Client, body: dict[str, Any], sources: Iterable[object]) -> None:
    """Send the files of this machine among the sources that flags name, and name the uploads in their place."""
    sent = {source: client.upload([Path(source)]).id for source in _files(sources)}
    parts = [*_parts(body), *([body["finetune"]] if isinstance(body.get("finetune"), dict) else [])]
    for part in parts:
        part["dataset"] = sent.get(str(part.get("dataset")), part.get("dataset"))


def _files(sources: Iterable[object]) -> list[str]:
    return [source for source in dict.fromkeys(sources) if isinstance(source, str) and Path(source).is_file()]


def _parts(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parts of the mixture and the tasks of a request that are objects with a dataset."""
    calibration, evaluation = (body.get(name) or {} for name in ("calibration", "evaluation"))
    lists = (calibration.get("dataset"), evaluation.get("tasks"))
    parts = [part for each in lists if isinstance(each, list) for part in each]
    return [part for part in parts if isinstance(part, dict) and isinstance(part.get("dataset"), str)]


def parse_mixture(parts: list[str]) -> list[dict[str, Any]]:
    """[{"dataset": "chat.jsonl", "share": 0.3}] from ["chat.jsonl=0.3"]; ":tools" before "=" names a kind of rows.

    Raises:
        RequestError: one is not SOURCE=SHARE.
    """
    return [_part(text) for text in parts]


def _part(text: str) -> dict[str, Any]:
    source, _, share = text.rpartition("=")
    try:
        part: dict[str, Any] = {"share": float(share)}
    except ValueError as error:
        hint = "e.g. --mix chat.jsonl=0.3 --mix builtin=0.7"
        raise RequestError(f"{text!r} is not SOURCE=SHARE", field="mix", value=text, hint=hint) from error
    name, _, kind = source.rpartition(":")
    if name and kind in ROW_KINDS:
        return {"dataset": _absolute(name), "kind": kind, **part}
    return {"dataset": _absolute(source), **part}


def parse_tasks(tasks: list[str] | None) -> list[dict[str, Any]]:
    """[{"name": "arc", "kind": "multiple_choice", "dataset": "arc.jsonl"}] from ["arc=multiple_choice:arc.jsonl"].

    Raises:
        RequestError: one is not NAME=KIND:SOURCE.
    """
    parsed = []
    for task in tasks or []:
        name, equals, rest = task.partition("=")
        kind, colon, source = rest.partition(":")
        if not equals or not colon:
            hint = "e.g. --task arc=multiple_choice:arc.jsonl"
            raise RequestError(f"{task!r} is not NAME=KIND:SOURCE", field="task", value=task, hint=hint)
        parsed.append({"name": name, "kind": kind, "dataset": _absolute(source)})
    return parsed


def parse_scheme(text: str | None) -> int | str | None:
    """A width in bits, or a scheme's name, as a request has it."""
    return int(text) if text is not None and text.isdecimal() else text


def width(bits: int | None, average: float | None) -> int | dict[str, float] | None:
    """The field `bits`: a width, or the mean of widths that the job chooses.

    Raises:
        RequestError: both are given.
    """
    if average is None:
        return bits
    if bits is not None:
        hint = "leave out --bits, or --average-bits"
        raise RequestError("--bits gives every weight a width", field="average_bits", value=average, hint=hint)
    return {"average": average}


def parse_overrides(overrides: list[str] | None) -> dict[str, dict[str, int | str]]:
    """{"*.down_proj": {"bits": 8}} from ["*.down_proj=8"], {"*.o_proj": {"scheme": "fp8"}} from ["*.o_proj=fp8"].

    Raises:
        RequestError: one is neither PATTERN=BITS nor PATTERN=SCHEME.
    """
    parsed: dict[str, dict[str, int | str]] = {}
    for override in overrides or []:
        pattern, _, given = override.rpartition("=")
        if not pattern or not given:
            hint = "e.g. --override '*.down_proj=8' or --override '*.down_proj=fp8'"
            detail = f"{override!r} is not PATTERN=BITS or PATTERN=SCHEME"
            raise RequestError(detail, field="override", value=override, hint=hint)
        if pattern in parsed:
            detail = f"the pattern {pattern!r} is given twice"
            raise RequestError(detail, field="override", value=pattern, hint="give each pattern once")
        parsed[pattern] = {"bits": int(given)} if given.isdecimal() else {"scheme": given}
    return parsed


def goal_fields(
    kl: float | None, size: str | None, memory: str | None, context: int | None, sequences: int | None
) -> dict[str, object]:
    """The goals that flags ask for, by field; None for one that none of them is about."""
    return {
        "at_most": _given(kl=kl, bytes=_size(size)),
        "fits": _given(memory=_size(memory), context=context, sequences=sequences),
    }


def _given(**flags: object) -> dict[str, object] | None:
    """The flags that were given, as an object; None without one."""
    return {name: value for name, value in flags.items() if value is not None} or None


def _size(text: str | None) -> str | int | None:
    """A number of bytes as a number; a size with a unit as it is, which the service reads."""
    return int(text) if text is not None and text.isdecimal() else text


def _absolute(source: str | None) -> str | None:
    """A path that exists here as an absolute one: the service has another working folder."""
    if source is None or not Path(source).expanduser().exists():
        return source
    return str(Path(source).expanduser().absolute())
