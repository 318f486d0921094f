// Visits a served page in headless Chromium and prints what it saw as JSON.
// node tests/visit.mjs ADDRESS CHROMIUM [selftest|...]
import { chromium } from "playwright-core";

const [address, executablePath, step = "selftest", extra] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const context = await browser.newContext();
const page = await context.newPage();
const seen = { requests: [], errors: [] };
context.on("request", (request) => seen.requests.push(request.url()));
page.on("pageerror", (error) => seen.errors.push(String(error)));
page.on("console", (message) => message.type() === "error" && seen.errors.push(message.text()));
const settled = () => page.waitForFunction(() => ["ready", "error"].includes(document.body.dataset.state), null, { timeout: 900_000 });

const steps = {
  async selftest() {
    await page.goto(`${address}?selftest&${extra ?? ""}`);
    await page.waitForSelector("#report, [data-state=error]", { timeout: 900_000 });
    await settled();
    return { status: await page.textContent("#status"), report: await page.evaluate(() => document.getElementById("report")?.textContent) };
  },
};
const found = await steps[step]();
console.log(JSON.stringify({ ...found, errors: seen.errors, foreign: seen.requests.filter((url) => !url.startsWith(address)) }));
await browser.close();
