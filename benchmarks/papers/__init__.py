"""The papers' own results, as far as they can be shown without MNIST, Penn Treebank or text8, which are not redistributed here.

    python -m benchmarks.papers.invariances        Ba, Kiros & Hinton 2016, table 1
    python -m benchmarks.papers.gradients          Cooijmans et al. 2016, figures 1a and 1b
    python -m benchmarks.papers.sequential_digits  Cooijmans et al. 2016, section 5.1, on 8 × 8 digits
    python -m benchmarks.papers.characters         Cooijmans et al. 2016, section 5.2, on Python's documentation
    python -m benchmarks.papers.small_batches      Ba et al. 2016, section 6.6; Laurent et al. 2016 and Deep Speech 2
    python -m benchmarks.papers.initial_state      Cooijmans et al. 2016: what a learned initial state is worth
    python -m benchmarks.papers                    writes the page of all results, benchmarks/papers/README.md

Each writes a JSON file and a picture into benchmarks/results/papers; with --quick a small run that writes nothing.
"""
