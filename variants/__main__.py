"""The table of all variants: python -m variants. Parameters are those of the cpu track, with each variant's default options."""

import inspect, re

import torch

import train_gpt, variants

def replaced_and_parameters(specs: tuple[str, ...], config: train_gpt.Config) -> tuple[str, int]:
    """(names that specs change, parameters of the model)."""
    with variants.applied(specs, config) as changed, torch.device("meta"):
        return ", ".join(sum(changed.values(), [])), sum(p.numel() for p in train_gpt.GPT(config).parameters())

def row_of(name: str, config: train_gpt.Config, baseline: int) -> tuple[str, ...]:
    try:
        replaced, parameters = replaced_and_parameters((name,), config)
        text = inspect.getdoc(variants.load(name)) or ""
    except Exception as error:  # whatever one file does, the table shows the others
        kind = "" if isinstance(error, train_gpt.RunError) else type(error).__name__ + ": "
        return name, f"broken: {kind}{' '.join(str(error).split())}"
    source, status = (next(iter(re.findall(rf"^{word}: *(.*)", text, re.M)), f"no {word}: line") for word in ("Source", "Status"))
    idea = next(iter(text.splitlines()), "no docstring")
    return name, replaced, f"{parameters:,}", f"{100 * (parameters / baseline - 1):+.1f} %", status, idea, source

def main():
    config = train_gpt.make_config(dict(vocab_size=257))
    baseline = replaced_and_parameters((), config)[1]
    rows = [("variant", "replaces", "parameters", "change", "status", "idea", "source"), ("baseline", "", f"{baseline:,}", "", "", "", "")]
    rows += [row_of(name, config, baseline) for name in variants.available()]
    widths = [max(len(row[column]) for row in rows if len(row) == len(rows[0])) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) if column in (2, 3) else cell.ljust(width) for column, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())

if __name__ == "__main__":
    main()
