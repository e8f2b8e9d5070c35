// Cartoon faces of random parts, with captions, for gallery.py and others:
//
//     npm install @dicebear/core@9 @dicebear/collection@9 @resvg/resvg-js
//     node benchmarks/drawn_faces.mjs FOLDER 5000 256 openPeeps
//
// Writes FOLDER/NUMBER.png, 5,000 of 256×256, and FOLDER/metadata.csv. Equal arguments give equal images. Styles are
// openPeeps (Pablo Stanley, CC0; the default), pixelArt (DiceBear, CC0) and bigSmile (Ashley Seo, CC BY 4.0).

import { createRequire } from 'node:module';
import fs from 'node:fs';
import path from 'node:path';

// Relative to where the command is called: imports look for packages beside this file alone.
const require = createRequire(path.join(process.cwd(), 'package.json'));
const { createAvatar } = await import(require.resolve('@dicebear/core'));
const collection = await import(require.resolve('@dicebear/collection'));
const { Resvg } = require('@resvg/resvg-js');

const BACKGROUND = { b6e3f4: 'light blue', c0aede: 'lavender', ffd5dc: 'pink', ffdfbf: 'peach', d1f4d9: 'mint' };
const HAIR = {
  '2c1b18': 'black', e8e1e1: 'white', ecdcbf: 'platinum', d6b370: 'blond', f59797: 'pink',
  b58143: 'light brown', a55728: 'auburn', '724133': 'brown', '4a312c': 'dark brown', c93305: 'red',
};
const SKIN = { ffdbb4: 'very light', edb98a: 'light', d08b5b: 'medium', ae5d29: 'dark', '694d3d': 'very dark' };
const CLOTHES = {
  e78276: 'red', ffcf77: 'orange', fdea6b: 'yellow', '78e185': 'green', '9ddadb': 'turquoise',
  '8fa7df': 'blue', e279c7: 'pink',
};

// flatTop2 becomes "flat top", and grayBun, which may have any colour, "bun".
const words = (name) => name.replace(/\d+$/, '').replace(/^gray/, '').replace(/([A-Z])/g, ' $1').trim().toLowerCase();

const named = (names, colour) => names[colour.slice(1)];

// What the styles have in common is said in the same words.
const common = (face) => [
  `${named(HAIR, face.hairColor)} hair`, words(face.hair), `${named(SKIN, face.skinColor)} skin`,
];

const CAPTIONS = {
  openPeeps(face, drawing) {
    // Most styles are black whatever the colour is.
    const parts = drawing.includes(face.headContrastColor) ? [`${named(HAIR, face.headContrastColor)} hair`] : [];
    parts.push(
      words(face.head), `${words(face.face)} face`, `${named(SKIN, face.skinColor)} skin`,
      `${named(CLOTHES, face.clothingColor)} clothes`,
    );
    for (const extra of [face.accessories, face.facialHair, face.mask]) if (extra) parts.push(words(extra));
    return parts;
  },
  pixelArt(face) {
    const extras = [face.glasses && 'glasses', face.hat && 'hat', face.beard && 'beard'].filter(Boolean);
    const mouth = words(face.mouth);
    return [...common(face), `${mouth} face`, `${named(CLOTHES, face.clothingColor)} clothes`, ...extras];
  },
  bigSmile(face) {
    return [...common(face), words(face.mouth), `${words(face.eyes)} eyes`, ...(face.accessories ? [words(face.accessories)] : [])];
  },
};
// Open Peeps has these colours itself.
const COLOURS = { hairColor: Object.keys(HAIR), skinColor: Object.keys(SKIN), clothingColor: Object.keys(CLOTHES) };

const [folder, count, size, style = 'openPeeps'] = process.argv.slice(2);
if (!(Number(count) > 0 && Number(size) > 0 && style in CAPTIONS)) {
  console.error(`node benchmarks/drawn_faces.mjs FOLDER COUNT SIZE [${Object.keys(CAPTIONS).join(' | ')}]`);
  process.exit(2);
}
fs.mkdirSync(folder, { recursive: true });
const rows = ['file_name,text'];
for (let number = 0; number < Number(count); number++) {
  const avatar = createAvatar(collection[style], {
    ...(style === 'openPeeps' ? {} : COLOURS),
    seed: String(number), size: Number(size), backgroundColor: Object.keys(BACKGROUND),
  });
  const name = `${String(number).padStart(5, '0')}.png`;
  fs.writeFileSync(path.join(folder, name), new Resvg(avatar.toString()).render().asPng());
  const face = avatar.toJson().extra;
  const background = `${named(BACKGROUND, face.primaryBackgroundColor)} background`;
  rows.push(`${name},"${[...CAPTIONS[style](face, avatar.toString()), background].join(', ')}"`);
}
fs.writeFileSync(path.join(folder, 'metadata.csv'), rows.join('\n') + '\n');
