"""An experiment: how fast does each architecture learn to repeat the token of three positions earlier?"""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F

from bsbr_pl import BSBRModel, LinearTransformer, StandardTransformer
from bsbr_pl.utils.research import ExperimentRunner

DELAY = 3


class Delay(ExperimentRunner):
    def setup(self):
        sizes = {"vocab_size": 16, "hidden_dim": 64, "num_layers": 2, "num_heads": 2}
        self.models = {
            "BSBR": BSBRModel(**sizes, chunk_size=32),
            "Linear": LinearTransformer(**sizes, chunk_size=32),
            "Standard": StandardTransformer(**sizes),
        }
        self.seq_lengths = self.config["seq_lengths"]
        self.metrics = ["loss", "accuracy"]

    def run_experiment(self, model, seq_length):
        model = copy.deepcopy(model)  # this function is timed several times, each time from the same weights
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(self.config["steps"]):
            input_ids = torch.randint(0, 16, (8, seq_length), device=self.device)
            logits = model(input_ids)[:, DELAY:]
            loss = F.cross_entropy(logits.flatten(0, 1), input_ids[:, :-DELAY].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        input_ids = torch.randint(0, 16, (64, seq_length), device=self.device)
        with torch.no_grad():
            outputs = model(input_ids)[:, DELAY:].argmax(-1) == input_ids[:, :-DELAY]
        return {"loss": loss.detach(), "accuracy": self.calculate_accuracy(outputs)}

    def calculate_accuracy(self, outputs):
        return outputs.float().mean()

    def analyze_results(self, results):
        """One line per cell. Records are flat, so pandas.DataFrame(results) works too."""
        return "\n".join(
            f"{r['model']:8} {r['seq_length']:4} tokens: accuracy {r['accuracy']:.3f}, "
            f"trained in {r['seconds']:.2f} s [{r['seconds_low']:.2f}, {r['seconds_high']:.2f}]"
            for r in results
        )


def main(seq_lengths=(32, 64, 128), steps=100, folder=Path(__file__).parent, output_dir="runs/delay"):
    experiment = Delay(output_dir, config={"seq_lengths": list(seq_lengths), "steps": steps})
    results = experiment.run()
    text = experiment.analyze_results(results)
    print(text)
    (folder / "experiment.txt").write_text(f"{text}\n")


if __name__ == "__main__":
    main()
