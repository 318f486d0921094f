// Sends the page's requests to the worker and receives its replies.
import type { Reply, Request, Result } from "./worker";

type Without<T> = T extends unknown ? Omit<T, "id"> : never;

export interface Done<T extends Result> {
  result: T;
  /** Time of the whole request. */
  milliseconds: number;
  /** Median time of one forward pass of the model, in milliseconds. */
  perRow: number;
}

/** The error of a request that was stopped or replaced by a newer one. */
export class Replaced extends Error {}

export class Client {
  private readonly worker = new Worker(new URL("worker.js", document.baseURI), { type: "module" });
  private readonly waiting = new Map<number, { resolve: (done: Done<never>) => void; reject: (error: Error) => void }>();
  private last = 0;

  constructor(private readonly progress: (done: number, all: number) => void) {
    this.worker.onmessage = ({ data }: MessageEvent<Reply>) => this.receive(data);
    this.worker.onerror = () => this.failAll(new Error("worker.js could not be started. Reload the page."));
  }

  ask<T extends Result>(request: Without<Request>): Promise<Done<T>> {
    const id = ++this.last;
    return new Promise<Done<T>>((resolve, reject) => {
      this.waiting.set(id, { resolve: resolve as (done: Done<never>) => void, reject });
      this.worker.postMessage({ ...request, id });
    });
  }

  private receive(reply: Reply): void {
    if (reply.kind === "progress") {
      if (reply.id === this.last) this.progress(reply.done, reply.all);
      return;
    }
    const pending = this.waiting.get(reply.id);
    this.waiting.delete(reply.id);
    if (reply.kind === "result") pending?.resolve(reply as unknown as Done<never>);
    else pending?.reject(reply.kind === "error" ? new Error(reply.message) : new Replaced());
  }

  private failAll(error: Error): void {
    for (const { reject } of this.waiting.values()) reject(error);
    this.waiting.clear();
  }
}
