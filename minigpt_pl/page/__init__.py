"""One HTML file that shows runs and runs a model in the browser. The JavaScript is in `assets`."""
