"""Five architectures side by side: time, memory and accuracy against the length of the sequence."""

from pathlib import Path

import matplotlib.pyplot as plt

from bsbr_pl.evals import analyze_results, compare_models


def main(
    seq_lengths=(32, 64, 128, 256, 512, 1024),
    models=("BSBR", "Linear", "DeltaNet", "SlidingWindow", "Standard"),
    metrics=("inference_time", "memory_usage", "accuracy"),
    folder=Path(__file__).parent,
    **options,
):
    results = compare_models(seq_lengths=seq_lengths, models=models, metrics=metrics, **options)
    analysis = analyze_results(results)
    print(analysis)
    (folder / "compare.txt").write_text(f"{analysis}\n")

    plt.figure(figsize=(13, 4))
    for i, metric in enumerate(metrics, 1):
        plt.subplot(1, len(metrics), i)
        for model in results["models"]:
            plt.plot(results["seq_lengths"], results[model][metric], marker="o", label=model)
        plt.xscale("log", base=2)
        plt.yscale("linear" if metric == "accuracy" else "log")
        if metric == "accuracy":
            plt.ylim(0, 1.05)
        plt.xlabel("sequence length (tokens)")
        plt.ylabel(f"{metric} ({results['units'][metric]})")
        if i == 1:
            plt.legend()
    plt.tight_layout()
    plt.savefig(folder / "compare.png", dpi=100)
    plt.close()


if __name__ == "__main__":
    main()
