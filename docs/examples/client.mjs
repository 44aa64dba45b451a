// A client in Node: npm ci; node client.mjs ENDPOINT IMAGE [MASK.pgm]
//
// Prints a line for each object: its category, score, box, and the number of its pixels; writes the first one's mask.
// For tcp:// set SERVER_KEY and KEY to the key files server.key and NAME.key_secret.
import { randomBytes } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { setTimeout } from "node:timers/promises";
import { decode, encode } from "@msgpack/msgpack";
import { Dealer } from "zeromq";

const [endpoint, imagePath, maskPath] = process.argv.slice(2);
if (!imagePath) throw new Error("usage: node client.mjs ENDPOINT IMAGE [MASK.pgm]");
const { SERVER_KEY, KEY } = process.env;
const readKey = (path, kind) => readFileSync(path, "utf8").match(new RegExp(`^\\s*${kind}-key = "(.{40})"`, "m"))[1];
const curve = SERVER_KEY && {
  curveServerKey: readKey(SERVER_KEY, "public"),
  curvePublicKey: readKey(KEY, "public"),
  curveSecretKey: readKey(KEY, "secret"),
};

const image = readFileSync(imagePath);
const header = { type: "submit", job: "1", image: { kind: "encoded" }, options: { score_threshold: 0.3 } };
const dealer = new Dealer({ ...curve, routingId: randomBytes(16).toString("hex"), linger: 0 });
const submit = () => dealer.send(["BMD1", encode(header), image]);
let connections = 0;
dealer.events.on("handshake", () => connections++ && submit()); // the daemon may have forgotten it; else nothing changes
dealer.events.on("handshake:error:auth", () => { throw new Error("this key is not allowed"); });
dealer.connect(endpoint);
await submit();
for await (const [, head, payload] of dealer) {
  const answer = decode(head);
  if (answer.type === "result") {
    print(decode(payload));
    break;
  }
  if (answer.retry_after_s === null || answer.code === "timeout") throw new Error(`${answer.code}: ${answer.reason}`);
  await setTimeout(1000 * answer.retry_after_s);
  await submit();
}
dealer.close();

function print(objects) {
  objects.forEach(({ category_name, score, bbox, segmentation }, index) => {
    const mask = decodeMask(segmentation);
    const box = bbox.map((number) => number.toFixed(1)).join(" ");
    console.log(`${category_name} ${score.toFixed(3)} box ${box} pixels ${mask.reduce((sum, pixel) => sum + pixel, 0)}`);
    if (index === 0 && maskPath) writeMask(mask, segmentation.size);
  });
}

// A byte for each pixel, 0 or 1, column after column.
function decodeMask({ size: [height, width], counts }) {
  const mask = new Uint8Array(height * width);
  const runs = [];
  for (let at = 0, pixel = 0; at < counts.length; ) {
    let run = 0, shift = 0, bits;
    do {
      bits = counts.charCodeAt(at++) - 48;
      run |= (bits & 31) << shift;
      shift += 5;
    } while (bits & 32);
    if (bits & 16) run |= -1 << shift;
    if (runs.length > 2) run += runs[runs.length - 2];
    mask.fill(runs.length % 2, pixel, (pixel += run));
    runs.push(run);
  }
  return mask;
}

function writeMask(mask, [height, width]) {
  const rows = Buffer.alloc(height * width);
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) rows[y * width + x] = 255 * mask[x * height + y];
  writeFileSync(maskPath, Buffer.concat([Buffer.from(`P5 ${width} ${height} 255\n`), rows]));
}
