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
