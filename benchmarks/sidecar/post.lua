-- wrk: posts allocations. Arguments after --: "cached" or "fresh", and a number that makes budgets differ between runs.
-- Prints one line of JSON at the end: requests, seconds, latencies in milliseconds, answers by status.
local threads = {}
local made = 0

function setup(thread)
  thread:set("id", #threads)
  table.insert(threads, thread)
end

function init(args)
  kind, run = args[1], tonumber(args[2])
  codes = {}
  headers = { ["Content-Type"] = "application/json" }
  fixed = wrk.format("POST", "/v1/allocations", headers, '{"model":"Qwen3-32B","budget":"18GiB"}')
end

function request()
  if kind == "cached" then return fixed end
  made = made + 1
  -- Budgets spread over 12 to 40 GiB, no two alike.
  local budget = 12884901888 + (made * 7919 * 65536 + id * 131 + run * 524309) % 30064771072
  return wrk.format("POST", "/v1/allocations", headers, string.format('{"model":"Qwen3-32B","budget":"%d"}', budget))
end

function response(status)
  codes[status] = (codes[status] or 0) + 1
end

function done(summary, latency)
  local total = {}
  for _, thread in ipairs(threads) do
    for status, count in pairs(thread:get("codes")) do total[status] = (total[status] or 0) + count end
  end
  local parts = {}
  for status, count in pairs(total) do table.insert(parts, string.format('"%d": %d', status, count)) end
  local e = summary.errors
  io.write(string.format(
    'JSON {"requests": %d, "seconds": %.3f, "p50": %.3f, "p90": %.3f, "p99": %.3f, "max": %.3f, "codes": {%s}, "socket_errors": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(90) / 1e3,
    latency:percentile(99) / 1e3, latency.max / 1e3, table.concat(parts, ", "), e.connect + e.read + e.write + e.timeout))
end
