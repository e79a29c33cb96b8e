-- After a render: Quarto puts require.js and jQuery from a content network on each page that has an HTML output, for
-- widgets that need them. No figure and no table here does, so they go.
local outputs = os.getenv("QUARTO_PROJECT_OUTPUT_FILES") or ""

for path in outputs:gmatch("[^\n]+") do
  if path:match("%.html$") then
    local file = assert(io.open(path, "rb"))
    local page = file:read("a")
    file:close()
    local kept = page
      :gsub('<script src="https://[^"]*/require%.min%.js"[^>]*></script>%s*', "")
      :gsub('<script src="https://[^"]*/jquery%.min%.js"[^>]*></script>%s*', "")
      :gsub('<script type="application/javascript">define%(\'jquery\'.-</script>%s*', "")
    if kept ~= page then
      file = assert(io.open(path, "wb"))
      file:write(kept)
      file:close()
    end
  end
end
