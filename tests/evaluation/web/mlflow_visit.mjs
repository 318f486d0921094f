// Visits MLflow's pages of tracked recipes in headless Chromium; prints the text of each page as JSON.
// node mlflow_visit.mjs ADDRESS CHROMIUM ASKED [PICTURES], in a directory that has the package playwright-core.
// ASKED: {experiment, runs: [id], parameters: [name], metrics: [name], model, version, expected: {page: [text]}}.
import { createRequire } from "node:module";

const { chromium } = createRequire(`${process.cwd()}/`)("playwright-core");
const [address, executablePath, asked, pictures] = process.argv.slice(2);
const { experiment, runs, parameters, metrics, model, version, expected } = JSON.parse(asked);
const UNUSED = ["Dataset", "Source", "Models"]; // columns that would push the metrics out of the picture
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const context = await browser.newContext({ viewport: { width: 1400, height: 640 } });
await context.addInitScript(() => // MLflow's assistant stays closed
  localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true"));

const visits = {
  /** The table of runs, with columns of the metrics. */
  async runs(page) {
    await page.goto(`${address}/#/experiments/${experiment}/runs?workflowType=machine_learning`);
    await page.locator(".ag-row").first().waitFor();
    await page.getByRole("button", { name: "Columns", exact: true }).click();
    for (const name of [...UNUSED, ...metrics]) {
      await page.getByPlaceholder("Search columns").fill(name);
      const column = page.getByTestId("column-selector-tree").locator("[class*=tree-treenode]");
      await column.filter({ hasText: new RegExp(`^${name}$`) }).locator("[class*=tree-checkbox]").first().click();
    }
    await page.keyboard.press("Escape");
    await page.mouse.move(0, 0);
  },
  async version(page) {
    await page.goto(`${address}/#/models/${model}/versions/${version}?workflowType=machine_learning`);
  },
  /** Where the link in the version's description leads. */
  async report(page) {
    await visits.version(page);
    const link = page.getByRole("link", { name: "Report", exact: true });
    await page.goto(new URL(await link.getAttribute("href"), page.url()).href);
  },
  /** Parallel coordinates of the runs. */
  async parallel(page) {
    const [ids, experiments] = [runs, [experiment]].map((list) => encodeURIComponent(JSON.stringify(list)));
    await page.goto(`${address}/#/compare-runs?runs=${ids}&experiments=${experiments}&workflowType=machine_learning`);
    await page.getByText("Clear All").click();
    for (const [place, names] of [parameters, metrics].entries()) {
      const field = page.getByRole("combobox").nth(place);
      await field.click();
      for (const name of names) {
        await field.fill(name); // waits until the list is open
        await page.locator(`[class*=select-item-option][title="${name}"]`).click();
      }
      await page.keyboard.press("Escape");
    }
  },
};

const found = {};
try {
  for (const [name, visit] of Object.entries(visits)) {
    const page = await context.newPage();
    page.setDefaultTimeout(120_000);
    const errors = [];
    page.on("pageerror", (error) => errors.push(String(error)));
    try {
      await visit(page);
      await page.waitForFunction(
        (texts) => texts.every((text) => document.body.innerText.includes(text)), expected[name] ?? [],
      );
    } catch (problem) { errors.push(String(problem)); }
    if (pictures) await page.screenshot({ path: `${pictures}/${name}.png` });
    found[name] = { text: await page.evaluate(() => document.body.innerText), errors };
    await page.close();
  }
} finally { await browser.close(); }
console.log(JSON.stringify(found));
