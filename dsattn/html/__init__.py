"""Reports as one self-contained page: template, style, script and charts. ``dsattn.html.page.write_page`` writes it."""
