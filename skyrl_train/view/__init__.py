"""`skyrl view`: a local web page that shows runs, their curves and every episode. It only reads run folders."""
