"""The commands of `portnorm`, a module each, with what it takes (`add_options`) and what it does (`run`)."""

COMMANDS = {
    "demo": "train three LSTMs on real digits in NumPy, export them, check them in onnxruntime",
    "train": "train a classifier or a regression of sequences: an LSTM, its last state, a linear layer",
    "predict": "write what a model gives for the sequences of a file",
    "import": "make a checkpoint from weights that another library stored",
    "export": "write a checkpoint as an ONNX file, checked in onnxruntime first",
    "verify": "check an ONNX file against a checkpoint, or against the layer that it says it holds",
    "draw": "draw the graph of an ONNX file, with the body of its loop, as an SVG picture",
    "bench": "time this library and its peers, checked against float64 first, or an ONNX file in the installed runtimes",
    "conform": "measure array libraries and runtimes against float64, one table of cases for all",
    "warm": "compile the kernels for NumPy arrays now, for instance when a container is built",
    "info": "what is installed and compiled, or what is in a checkpoint",
}
"""What each is for. The module of a command is loaded when it is named, so that `--help` need not wait for all of them."""
