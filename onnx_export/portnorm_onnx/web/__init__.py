"""onnxruntime-web, in Node.js and in a page."""
