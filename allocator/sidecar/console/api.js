// Asks the service. The token lives in this tab only; an answer that is no success becomes an ApiError.

export class ApiError extends Error {
  constructor(status, body) {
    const error = (body && body.error) || {};
    super(error.message || `the service answered ${status}`);
    this.status = status;
    this.type = error.type;
    this.param = error.param;
  }
}

const KEY = "gamma-token";

export function token() {
  return sessionStorage.getItem(KEY) || "";
}

export function setToken(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

// `body`: an object, or JSON as text, which is sent as it is.
export async function ask(method, path, body, signal) {
  return JSON.parse(await askText(method, path, body, signal));
}

export async function askText(method, path, body, signal) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (token()) headers.Authorization = `Bearer ${token()}`;
  let answer;
  try {
    answer = await fetch(path, { method, headers, signal, body: typeof body === "object" ? JSON.stringify(body) : body });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { error: { message: "the service does not answer" } });
  }
  const text = await answer.text();
  if (answer.ok) return text;
  let document = null;
  try {
    document = JSON.parse(text);
  } catch {
    document = null; // a proxy's own page
  }
  throw new ApiError(answer.status, document);
}

// A 429 is waited for as long as the service says, a few times.
export async function askPatiently(method, path, body, signal) {
  for (let attempt = 0; ; attempt++) {
    try {
      return await ask(method, path, body, signal);
    } catch (error) {
      if (error.status !== 429 || attempt === 4) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
}
