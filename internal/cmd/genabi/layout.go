package main

import (
	"bytes"
	"cmp"
	"debug/dwarf"
	"debug/elf"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
)

// layout is what a compiler says: the structs, in the table's order, and the constants, in the headers' order.
type layout struct {
	records []*record
	groups  []group
}

// record is a struct as Go sees it: anonymous structs and unions inside it have been resolved.
type record struct {
	c, goName   string // an anonymous struct of a union is named by the way to it, as rxe_send_wr.wr.rdma
	header      string
	size, align int64
	fields      []field
	members     []member
}

// field is a field of the Go struct.
type field struct {
	c, goName    string
	typ          string
	offset, size int64
	align        int64  // of the type in Go: less than in C where it stands for a union
	comment      string // what else the bytes may be
}

// member is what a Go struct has no field for, and therefore a constant with its offset: a flexible array at the end, or
// part of a union.
type member struct {
	c, goName string // the way to it from its record, and the name without the record's
	long      string // goName with the union's name in it
	offset    int64
}

// group is an enum, or the macros of a header.
type group struct {
	file   *goFile
	header string
	line   int
	tag    string // of an enum; "" is an anonymous one
	macros bool
	consts []constant
}

type constant struct {
	name  string
	value int64
	hex   bool // how the header writes it
}

type wantedStruct struct {
	file      *goFile
	c, goName string
}

// structs returns the table's list of structs.
var structs = sync.OnceValue(func() (all []wantedStruct) {
	for i := range wanted {
		for _, n := range wanted[i].structs {
			for w := range strings.FieldsSeq(n.c) {
				c, goName, ok := strings.Cut(w, "=")
				if !ok {
					goName = n.prefix + camel(strings.TrimPrefix(c, n.strip))
				}
				all = append(all, wantedStruct{&wanted[i], c, goName})
			}
		}
	}
	return all
})

// fileOf returns the Go file that a constant of a header belongs to, nil if it is not wanted.
func fileOf(header, name string) *goFile {
	for i := range wanted {
		f := &wanted[i]
		if slices.Contains(f.headers, header) &&
			slices.ContainsFunc(f.consts, func(prefix string) bool { return strings.HasPrefix(name, prefix) }) {
			return f
		}
	}
	return nil
}

// reader turns debugging information into a layout.
type reader struct {
	data    *dwarf.Data
	include string
	files   []*dwarf.LineFile
	goNames map[string]string // C tag -> Go name
	tags    map[string]*dwarf.StructType
	headers map[string]string
	enums   []group
	asked   map[string]int64 // the enumerators of alignName and macroName
	layout  *layout
}

func readLayout(cc *compiler, include string) (*layout, error) {
	object, macros, err := cc.compile(include)
	if err != nil {
		return nil, err
	}
	f, err := elf.NewFile(bytes.NewReader(object))
	if err != nil {
		return nil, err
	}
	data, err := f.DWARF()
	if err != nil {
		return nil, err
	}
	r := &reader{
		data: data, include: include, layout: &layout{},
		goNames: map[string]string{}, tags: map[string]*dwarf.StructType{}, headers: map[string]string{}, asked: map[string]int64{},
	}
	if err := r.scan(); err != nil {
		return nil, err
	}
	all := structs()
	for _, s := range all {
		if r.goNames[s.c] != "" {
			return nil, fmt.Errorf("struct %s is in the table twice", s.c)
		}
		r.goNames[s.c] = s.goName
	}
	for _, s := range all {
		if err := r.top(s); err != nil {
			return nil, fmt.Errorf("struct %s: %w", s.c, err)
		}
	}
	return r.layout, r.constants(macros)
}

// scan lists the types of the compilation unit by name.
func (r *reader) scan() error {
	for entries := r.data.Reader(); ; {
		e, err := entries.Next()
		if err != nil {
			return err
		}
		if e == nil {
			return nil
		}
		switch e.Tag {
		case dwarf.TagCompileUnit:
			lines, err := r.data.LineReader(e)
			if err != nil {
				return err
			}
			r.files = lines.Files()
		case dwarf.TagStructType:
			name, _ := e.Val(dwarf.AttrName).(string)
			if incomplete, _ := e.Val(dwarf.AttrDeclaration).(bool); name == "" || incomplete {
				continue
			}
			t, err := r.data.Type(e.Offset)
			if err != nil {
				return err
			}
			r.tags[name] = t.(*dwarf.StructType)
			r.headers[name], _ = r.place(e)
		case dwarf.TagEnumerationType:
			t, err := r.data.Type(e.Offset)
			if err != nil {
				return err
			}
			g := group{tag: t.(*dwarf.EnumType).EnumName}
			g.header, g.line = r.place(e)
			for _, v := range t.(*dwarf.EnumType).Val {
				g.consts = append(g.consts, constant{name: v.Name, value: v.Val})
				if strings.HasPrefix(v.Name, "genabi_") {
					r.asked[v.Name] = v.Val
				}
			}
			r.enums = append(r.enums, g)
		}
	}
}

// place returns the header and line in which something is declared.
func (r *reader) place(e *dwarf.Entry) (header string, line int) {
	n, _ := e.Val(dwarf.AttrDeclFile).(int64)
	if n > 0 && int(n) < len(r.files) && r.files[n] != nil {
		header = relative(r.files[n].Name, r.include)
	}
	at, _ := e.Val(dwarf.AttrDeclLine).(int64)
	return header, int(at)
}

// top reads a struct of the table.
func (r *reader) top(s wantedStruct) error {
	t, ok := r.tags[s.c]
	if !ok {
		return fmt.Errorf("not in the debugging information")
	}
	rec := &record{c: s.c, goName: s.goName, header: r.headers[s.c]}
	if err := r.record(rec, t); err != nil {
		return err
	}
	if want := r.asked[alignName(s.c)]; rec.align != want {
		return fmt.Errorf("aligned to %d, and its fields to %d: a packed struct needs thought", want, rec.align)
	}
	return natural(t)
}

// natural says where a struct is not laid out by the rule that the architectures have in common: numbers and pointers are as large on each
// (LP64) and aligned to their size, and a field comes as soon behind the one before as its alignment allows.
func natural(t *dwarf.StructType) error {
	end := int64(0)
	for _, f := range t.Field {
		if t.Kind == "union" {
			end = max(end, size(f.Type))
			if f.ByteOffset != 0 {
				return fmt.Errorf("%s is at %d of a union", f.Name, f.ByteOffset)
			}
		} else {
			if at := roundUp(end, alignOf(f.Type)); f.ByteOffset != at {
				return fmt.Errorf("%s is at %d, and by its alignment would be at %d", f.Name, f.ByteOffset, at)
			}
			end = f.ByteOffset + size(f.Type)
		}
		inner := strip(f.Type)
		for a, ok := inner.(*dwarf.ArrayType); ok; a, ok = inner.(*dwarf.ArrayType) {
			inner = strip(a.Type)
		}
		switch inner := inner.(type) {
		case *dwarf.StructType:
			if err := natural(inner); err != nil {
				return fmt.Errorf("%s: %w", f.Name, err)
			}
		default:
			if n := inner.Size(); n > 8 {
				return fmt.Errorf("%s is a number of %d bytes", f.Name, n)
			}
		}
	}
	if want := roundUp(end, alignOf(t)); t.ByteSize != want {
		return fmt.Errorf("%d bytes, and by its alignment would be %d", t.ByteSize, want)
	}
	return nil
}

func roundUp(n, align int64) int64 { return (n + align - 1) / align * align }

// record fills in a struct and appends it to the layout, before those that are inside it.
func (r *reader) record(rec *record, t *dwarf.StructType) error {
	at := len(r.layout.records)
	rec.size, rec.align = t.ByteSize, alignOf(t)
	if err := r.addFields(rec, t, 0); err != nil {
		return err
	}
	// A union's name is only needed in the names of offsets if they would be ambiguous without.
	count := map[string]int{}
	for _, m := range rec.members {
		count[m.goName]++
	}
	for i, m := range rec.members {
		if count[m.goName] > 1 {
			rec.members[i].goName = m.long
		}
	}
	r.layout.records = slices.Insert(r.layout.records, at, rec)
	return nil
}

// addFields adds the fields of t, which lies at offset within rec.
func (r *reader) addFields(rec *record, t *dwarf.StructType, offset int64) error {
	for _, f := range t.Field {
		if f.BitSize != 0 {
			return fmt.Errorf("%s is a bit field", f.Name)
		}
		if err := r.addField(rec, f.Name, f.Type, offset+f.ByteOffset); err != nil {
			return err
		}
	}
	return nil
}

func (r *reader) addField(rec *record, name string, t dwarf.Type, offset int64) error {
	t = strip(t)
	st, isStruct := t.(*dwarf.StructType)
	switch {
	case isStruct && name == "" && st.Kind == "struct":
		return r.addFields(rec, st, offset)
	case isStruct && name == "" && st.Kind == "union":
		return r.anonymousUnion(rec, st, offset)
	case size(t) == 0:
		if isStruct && len(st.Field) == 0 {
			return nil // the empty struct of __DECLARE_FLEX_ARRAY
		}
		rec.members = append(rec.members, member{c: name, goName: camel(name), long: camel(name), offset: offset})
		return nil
	}

	f := field{c: name, goName: camel(name), offset: offset, size: size(t), align: alignOf(t)}
	switch {
	case asBytes[rec.c+"."+name]:
		f.typ, f.align = fmt.Sprintf("[%d]byte", f.size), 1
	case isStruct && st.Kind == "union":
		// Words of the union's own alignment: which member is in them is for the reader to know.
		f.typ = fmt.Sprintf("uint%d", 8*f.align)
		if f.size != f.align {
			f.typ = fmt.Sprintf("[%d]%s", f.size/f.align, f.typ)
		}
		var names []string
		for _, m := range st.Field {
			if isPointer(m.Type) {
				continue
			}
			names = append(names, m.Name)
			if err := r.unionMember(rec, []string{name}, 1, m, offset); err != nil {
				return err
			}
		}
		f.comment = "union: " + strings.Join(names, ", ")
	case isStruct && st.StructName == "":
		inner := &record{c: rec.c + "." + name, goName: rec.goName + camel(name), header: rec.header}
		if err := r.record(inner, st); err != nil {
			return err
		}
		f.typ = inner.goName
	default:
		var err error
		if f.typ, err = r.goType(t); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	rec.fields = append(rec.fields, f)
	return nil
}

// anonymousUnion makes fields of the first member that is as large as the union, so that it is used as in C; the others
// become offsets.
func (r *reader) anonymousUnion(rec *record, t *dwarf.StructType, offset int64) error {
	chosen := -1
	for i, m := range t.Field {
		if t.ByteSize != 0 && !isPointer(m.Type) && size(m.Type) == t.ByteSize {
			chosen = i
			break
		}
	}
	if chosen < 0 && t.ByteSize != 0 {
		return fmt.Errorf("no member of an anonymous union at %d is as large as it", offset)
	}
	first := len(rec.fields)
	var others []string
	for i, m := range t.Field {
		switch {
		case i == chosen, t.ByteSize == 0: // members of no size are flexible arrays, and become offsets anyway
			if err := r.addField(rec, m.Name, m.Type, offset); err != nil {
				return err
			}
		case isPointer(m.Type):
		default:
			if m.Name != "" {
				others = append(others, m.Name)
			}
			if err := r.unionMember(rec, nil, 0, m, offset); err != nil {
				return err
			}
		}
	}
	if len(others) > 0 {
		rec.fields[first].comment = "or " + strings.Join(others, ", ")
	}
	return nil
}

// unionMember records where the fields of a union's member are, and makes a type of an anonymous struct, so that a
// pointer to the union may be converted to it. way leads from rec to the union; the first outer steps of it are the
// union's own name.
func (r *reader) unionMember(rec *record, way []string, outer int, f *dwarf.StructField, offset int64) error {
	t := strip(f.Type)
	offset += f.ByteOffset
	if f.Name != "" {
		way = append(slices.Clip(way), f.Name)
	}
	if st, ok := t.(*dwarf.StructType); ok && st.StructName == "" {
		if st.Kind == "struct" && f.Name != "" && len(st.Field) > 1 {
			inner := &record{c: rec.c + "." + strings.Join(way, "."), goName: rec.goName + camel(f.Name), header: rec.header}
			if err := r.record(inner, st); err != nil {
				return err
			}
		}
		for _, m := range st.Field {
			if isPointer(m.Type) {
				continue
			}
			if err := r.unionMember(rec, way, outer, m, offset); err != nil {
				return err
			}
		}
		return nil
	}
	rec.members = append(rec.members, member{
		c: strings.Join(way, "."), goName: camel(strings.Join(way[outer:], "_")), long: camel(strings.Join(way, "_")), offset: offset,
	})
	return nil
}

// goType returns the Go type of what is not an anonymous struct or union.
func (r *reader) goType(t dwarf.Type) (string, error) {
	switch t := strip(t).(type) {
	case *dwarf.TypedefType: // strip leaves the big-endian ones
		return strings.ToUpper(strings.TrimPrefix(t.Name, "__")), nil
	case *dwarf.UintType, *dwarf.UcharType, *dwarf.EnumType:
		return fmt.Sprintf("uint%d", 8*t.Size()), nil
	case *dwarf.IntType:
		return fmt.Sprintf("int%d", 8*t.ByteSize), nil
	case *dwarf.CharType: // only in arrays of bytes; its sign is the architecture's
		return "uint8", nil
	case *dwarf.ArrayType:
		elem, err := r.goType(t.Type)
		if elem == "uint8" {
			elem = "byte"
		}
		return fmt.Sprintf("[%d]%s", t.Count, elem), err
	case *dwarf.StructType:
		if t.Kind == "struct" && r.goNames[t.StructName] != "" {
			return r.goNames[t.StructName], nil
		}
		return "", fmt.Errorf("%s %s is used, and not in the table", t.Kind, t.StructName)
	default:
		return "", fmt.Errorf("no Go type for %s", t)
	}
}

// strip takes away type names and qualifiers, all but the names that say a byte order.
func strip(t dwarf.Type) dwarf.Type {
	for {
		switch u := t.(type) {
		case *dwarf.TypedefType:
			switch u.Name {
			case "__be16", "__be32", "__be64":
				return t
			}
			t = u.Type
		case *dwarf.QualType:
			t = u.Type
		default:
			return t
		}
	}
}

func isPointer(t dwarf.Type) bool {
	_, ok := strip(t).(*dwarf.PtrType)
	return ok
}

// size is that of sizeof: 0 for flexible arrays.
func size(t dwarf.Type) int64 {
	switch t := strip(t).(type) {
	case *dwarf.ArrayType:
		return max(t.Count, 0) * size(t.Type)
	default:
		return max(t.Size(), 0)
	}
}

// alignOf follows from the fields, as long as nothing is packed; top compares it with the compiler's word.
func alignOf(t dwarf.Type) int64 {
	switch t := strip(t).(type) {
	case *dwarf.ArrayType:
		return alignOf(t.Type)
	case *dwarf.StructType:
		a := int64(1)
		for _, f := range t.Field {
			a = max(a, alignOf(f.Type))
		}
		return a
	default:
		return t.Size()
	}
}

// constants sorts the wanted enumerators and macros into the layout.
func (r *reader) constants(macros []macro) error {
	var groups []group
	for _, e := range r.enums {
		g := e
		g.consts = nil
		for _, c := range e.consts {
			if f := fileOf(e.header, c.name); f != nil {
				g.file = f
				g.consts = append(g.consts, c)
			}
		}
		if g.file != nil {
			groups = append(groups, g)
		}
	}
	ofHeader := map[string]*group{}
	for _, m := range macros {
		value, ok := r.asked[macroName(m.name)]
		if !ok {
			return fmt.Errorf("macro %s: no value in the debugging information", m.name)
		}
		g := ofHeader[m.header]
		if g == nil {
			g = &group{file: fileOf(m.header, m.name), header: m.header, macros: true} // line 0: before the enums
			ofHeader[m.header] = g
		}
		g.consts = append(g.consts, constant{m.name, value, m.hex})
	}
	for _, h := range slices.Sorted(maps.Keys(ofHeader)) {
		groups = append(groups, *ofHeader[h])
	}
	slices.SortStableFunc(groups, func(a, b group) int {
		return cmp.Or(
			cmp.Compare(slices.Index(a.file.headers, a.header), slices.Index(b.file.headers, b.header)),
			cmp.Compare(a.line, b.line))
	})
	for _, f := range wanted {
		for _, prefix := range f.consts {
			if !slices.ContainsFunc(groups, func(g group) bool {
				return g.file.name == f.name && slices.ContainsFunc(g.consts, func(c constant) bool { return strings.HasPrefix(c.name, prefix) })
			}) {
				return fmt.Errorf("%s: no constant begins with %s", f.name, prefix)
			}
		}
	}
	r.layout.groups = groups
	return nil
}
