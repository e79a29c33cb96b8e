-- What Quarto is told about pages that nbdev has prepared.

-- nbdev makes links of `names` in all that `show_doc` prints, inside its code block too, where a link is only noise.
function CodeBlock(block)
  block.text = block.text:gsub("%[(`[^`\n]+`)%]%(https?://[^)%s]+%)", "%1")
  return block
end

-- Nor has a private name a place of its own on a page.
function Link(link)
  if link.target:match("%.html#_") then return link.content end
end

-- A picture alone in its paragraph becomes a figure with its words below it. The Colab badge is a link, and its words stand in for the picture.
function Figure(figure)
  local inside = figure.content[1]
  local link = inside and inside.content and inside.content[1]
  if link and link.t == "Link" and link.target:match("^https://colab%.research%.google%.com/") then
    local words = pandoc.utils.blocks_to_inlines(figure.caption.long)
    return pandoc.Para { link:walk { Image = function(image) image.caption = words; return image end } }
  end
end

-- A cell with `#| classes: beside` stands beside the words and equations before it, back to a heading or another cell.
local function is_break(block)
  return block.t == "Header" or block.t == "Table"
    or (block.t == "Div" and (block.classes:includes("cell") or block.classes:includes("side-by-side")))
end

function Blocks(blocks)
  local out = pandoc.Blocks {}
  for _, block in ipairs(blocks) do
    if block.t == "Div" and block.classes:includes("beside") then
      local words = pandoc.Blocks {}
      while #out > 0 and not is_break(out[#out]) do words:insert(1, out:remove(#out)) end
      if #words > 0 then
        block = pandoc.Div({ pandoc.Div(words, pandoc.Attr("", { "words" })), block }, pandoc.Attr("", { "side-by-side" }))
      end
    end
    out:insert(block)
  end
  return out
end
