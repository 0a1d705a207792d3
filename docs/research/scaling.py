"""How time, memory and FLOPs of a forward pass grow with the length of the sequence."""

from pathlib import Path

import matplotlib.pyplot as plt

from bsbr_pl.evals import analyze_results, scaling_analysis


def main(
    seq_lengths=(64, 128, 256, 512, 1024, 2048),
    models=("BSBR", "Linear", "Standard"),
    metrics=("time", "memory", "flops"),
    folder=Path(__file__).parent,
    **options,
):
    results = scaling_analysis(seq_lengths=seq_lengths, models=models, metrics=metrics, **options)
    analysis = analyze_results(results)
    print(analysis)
    (folder / "scaling.txt").write_text(f"{analysis}\n")

    plt.figure(figsize=(13, 4))
    for i, metric in enumerate(metrics, 1):
        plt.subplot(1, len(metrics), i)
        for model in results["models"]:
            plt.loglog(results["seq_lengths"], results[model][metric], marker="o", base=2, label=model)
        plt.xlabel("sequence length (tokens)")
        plt.ylabel(f"{metric} ({results['units'][metric]})")
    plt.legend()
    plt.tight_layout()
    plt.savefig(folder / "scaling.png", dpi=100)
    plt.close()


if __name__ == "__main__":
    main()
