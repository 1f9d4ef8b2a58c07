// What scrolls sideways can be scrolled with the keyboard, too: tables, formulas and figures that are wider than the page.
(() => {
  const WIDE = '.md-typeset__scrollwrap, math[display="block"], .md-typeset p:has(> img[src$=".svg"])';
  const mark = () => {
    for (const box of document.querySelectorAll(WIDE)) {
      if (box.scrollWidth > box.clientWidth + 1) box.setAttribute("tabindex", "0");
      else box.removeAttribute("tabindex");
    }
  };
  // The theme wraps tables when the page has loaded, and a fold that opens has boxes of its own.
  addEventListener("load", () => setTimeout(mark));
  addEventListener("resize", mark);
  document.addEventListener("toggle", mark, true);
})();
