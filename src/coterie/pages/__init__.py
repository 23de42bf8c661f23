"""Pages that open from disk: their parts (`page`, `page.css`, `page.js`), and that of `coterie report` (`summary`)."""
