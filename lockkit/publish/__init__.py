"""From a folder that lockkit wrote to a public repository: figures in the card, upload, signature, bill of materials."""
