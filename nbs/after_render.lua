-- After a render. Quarto puts require.js and jQuery from a content network on each page that has an HTML output, for
-- widgets that need them, and a polyfill for old browsers on each page with maths. No page here needs any of them.
local unneeded = {
  '<script src="https://[^"]*/require%.min%.js"[^>]*></script>%s*',
  '<script src="https://[^"]*/jquery%.min%.js"[^>]*></script>%s*',
  '<script src="https://[^"]*/polyfill%.min%.js[^"]*"[^>]*></script>%s*',
  '<script type="application/javascript">define%(\'jquery\'.-</script>%s*',
}

local function change(path, how)
  local file = io.open(path, "rb")
  if not file then return end
  local before = file:read("a")
  file:close()
  local after = how(before)
  if after == before then return end
  file = assert(io.open(path, "wb"))
  file:write(after)
  file:close()
end

-- Where scripts do not run, nothing takes the dark style sheets away again: there they do not apply.
local function tidied(page)
  for _, pattern in ipairs(unneeded) do page = page:gsub(pattern, "") end
  return (page:gsub('class="quarto%-color%-scheme quarto%-color%-alternate" id', 'media="(scripting: enabled)" %0'))
end

local outputs = os.getenv("QUARTO_PROJECT_OUTPUT_FILES") or ""
for path in outputs:gmatch("[^\n]+") do
  if path:match("%.html$") then change(path, tidied) end
end

-- The search takes pages in the order of the index where they fit alike: the API first, so that a public name finds its entry,
-- and of the API last the page of the API itself and those that show names of other modules again.
local last = { ["api.html"] = 1, ["api_train.html"] = 1, ["api_datasets.html"] = 1 }
local function api_first(index)
  local entries = pandoc.json.decode(index, false)
  local place = {}
  for k, entry in ipairs(entries) do
    local page = entry.href:match("^[^#]*")
    local rank = not page:match("^api") and 2 or last[page] or 0
    place[entry] = rank * #entries + k
  end
  table.sort(entries, function(a, b) return place[a] < place[b] end)
  return pandoc.json.encode(entries)
end
change((os.getenv("QUARTO_PROJECT_OUTPUT_DIR") or "_docs") .. "/search.json", api_first)
