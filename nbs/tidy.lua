-- What Quarto is told about pages that nbdev has prepared.

-- nbdev makes links of `names` in all that `show_doc` prints, inside its code block too, where a link is only noise.
local function CodeBlock(block)
  block.text = block.text:gsub("%[(`[^`\n]+`)%]%(https?://[^)%s]+%)", "%1")
  return block
end

-- It does so in the words of a link as well, which pandoc then takes for text: the name alone is meant.
local function without_inner_link(content)
  local name = content:find_if(function(inline) return inline.t == "Code" end)
  local said = pandoc.utils.stringify(content)
  if not name or not said:match("^%[.*%]%(https?://[^)]*%)$") then return content end
  return pandoc.Inlines { name }
end

-- Links within the site do not leave it. A private name has no place of its own on a page, and a method has its class's.
local function Link(link)
  if link.target:match("%.html#_") then return link.content end
  link.target = link.target:gsub("^(https://[%w-]+%.github%.io/gini_loss/[%w_]+%.html#[%w_]+)%.%w.*", "%1")
  link.target = link.target:gsub("^https://[%w-]+%.github%.io/gini_loss/([%w_]+%.html)", "%1")
  link.content = without_inner_link(link.content)
  return link
end

-- A bar in code is written with a backslash in a table's source, and without one on the page.
local function Table(tables)
  return tables:walk { Code = function(code) code.text = code.text:gsub("\\|", "|"); return code end }
end

-- A picture alone in its paragraph becomes a figure with its words below it. The Colab badge is a link, and its words stand in for the picture.
local function Figure(figure)
  local inside = figure.content[1]
  local link = inside and inside.content and inside.content[1]
  if link and link.t == "Link" and link.target:match("^https://colab%.research%.google%.com/") then
    local words = pandoc.utils.blocks_to_inlines(figure.caption.long)
    return pandoc.Para { link:walk { Image = function(image) image.caption = words; return image end } }
  end
end

-- The derivation: an equation of the paper with the words before it, and the code beside it. Such code is a cell with
-- `#| classes: beside`, or the two cells right below a numbered equation: the source that the page exports, unfolded, and
-- what it computes. The entry of the API that stands before that source moves below, over the whole width.
local function is_cell(block) return block and block.t == "Div" and block.classes:includes("cell") end
local function is_break(block)
  return block.t == "Header" or block.t == "Table" or is_cell(block)
    or (block.t == "Div" and block.classes:includes("side-by-side"))
end
local function is_entry(blocks, k)
  local header, source = blocks[k], blocks[k + 1]
  return header.t == "Header" and source ~= nil and source.t == "Para" and pandoc.utils.stringify(source) == "source"
end
local function has_number(blocks)
  local found = false
  blocks:walk { Math = function(math) found = found or math.text:match("\\tag{%d+}") ~= nil end }
  return found
end
local function shows_code(cell)
  local found = false
  cell:walk { CodeBlock = function(code) found = found or code.classes:includes("cell-code") end }
  return found
end
local function unfolded(cell)
  return cell:walk { CodeBlock = function(code)
    if code.attributes["code-fold"] then code.attributes["code-fold"] = "show" end
    return code
  end }
end

-- From place `k` on: entries of the API, the cells that stand beside, and the place after them
local function code_below(blocks, k)
  local entries, cells = pandoc.Blocks {}, pandoc.Blocks {}
  while blocks[k] and #cells < 2 do
    if is_cell(blocks[k]) then
      cells:insert(unfolded(blocks[k]))
      k = k + 1
    elseif is_entry(blocks, k) then
      repeat entries:insert(blocks[k]); k = k + 1 until not blocks[k] or is_cell(blocks[k]) or blocks[k].t == "Header"
    else
      break
    end
  end
  return entries, cells, k
end

-- A cell that draws by hand shows its figure, and its code when asked. Calls of the package's own plots stay open.
local function folds_drawing(cell)
  local figure = false
  cell:walk { Image = function() figure = true end }
  if not figure then return cell end
  return cell:walk { CodeBlock = function(code)
    local _, lines = code.text:gsub("\n", "")
    local drawn = code.text:match("subplots%(") or code.text:match("%f[%w]ax%.") or code.text:match("%f[%w]axs?%[")
    if code.classes:includes("cell-code") and drawn and lines > 3 and not code.attributes["code-fold"] then
      code.attributes["code-fold"] = "true"
      code.attributes["code-summary"] = "Code of the figure"
    end
    return code
  end }
end

local function Blocks(blocks)
  local out, k = pandoc.Blocks {}, 1
  while blocks[k] do
    local first = #out + 1
    while first > 1 and not is_break(out[first - 1]) do first = first - 1 end
    local words = pandoc.Blocks { table.unpack(out, first) }
    local chosen = is_cell(blocks[k]) and blocks[k].classes:includes("beside")
    local starts = is_entry(blocks, k) or is_cell(blocks[k]) and shows_code(blocks[k])
    local entries, cells, after = pandoc.Blocks {}, pandoc.Blocks {}, k
    if #words > 0 and starts and (chosen or has_number(words)) then entries, cells, after = code_below(blocks, k) end
    if #cells > 0 then
      for _ = first, #out do out:remove(#out) end
      local columns = { pandoc.Div(words, pandoc.Attr("", { "words" })), pandoc.Div(cells, pandoc.Attr("", { "code" })) }
      out:insert(pandoc.Div(columns, pandoc.Attr("", { "side-by-side" })))
      out:extend(entries)
      k = after
    else
      out:insert(is_cell(blocks[k]) and folds_drawing(blocks[k]) or blocks[k])
      k = k + 1
    end
  end
  return out
end

return { { CodeBlock = CodeBlock, Link = Link, Figure = Figure }, { Table = Table }, { Blocks = Blocks } }
